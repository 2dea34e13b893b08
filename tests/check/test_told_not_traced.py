"""Values that Python takes or trips over are told in one line, by `check` and by `merge` alike."""

import pytest
import torch
from typer.testing import CliRunner

import merganser
from merganser.cli import app
from merganser.errors import MerganserError, RecipeError, SentenceError, WeightsError
from merganser.recipe import read_recipe


@pytest.fixture
def models() -> tuple[dict, dict]:
    rng = torch.Generator().manual_seed(0)
    base = {
        "layer.weight": torch.randn(6, 4, generator=rng),
        "bias": torch.randn(6, generator=rng),
        "logit_scale": torch.tensor(2.0),
    }
    experts = {e: {n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in base.items()} for e in "ab"}
    return base, experts


WRONG = {
    "ties(density=[0.2, 0.3, 0.4])": "one number per expert",
    "trim(density=[0.2, 0.3, 0.4]) | average": "one number per expert",
    "breadcrumbs(density=[0.2, 0.3, 0.4]) | average": "one number per expert",
    "breadcrumbs(gamma=[]) | average": "one number per expert",
    "average | trim(density=[0.2, 0.3])": "density must lie in (0, 1]",
    "average | trim(density={'a': 0.2, 'b': 0.3})": "one merged model",
    "average | scale(by={'a': 5, 'b': 2})": "one merged model",
    "average | dare(keep={'a': 0.2, 'b': 0.3})": "one merged model",
    "ram(plus='no')": "plus must be True or False",
    "model_stock(filter_wise='yes')": "filter_wise must be True or False",
    "multislerp(normalize=1)": "normalize must be True or False",
    "ties(weights_vote=7)": "weights_vote must be True or False",
    "average | scale(by=True)": "by must be a number",
    "karcher(steps=True)": "steps must be a number",
    "trim(density={'a': True, 'b': 0.5}) | average": "density must be a number",
    "average(weights=2)": "one number per expert: got 2, 2 experts",
    "task_arithmetic(weights='x')": "one number per expert: got 'x', 2 experts",
    "permute(spec=[]) | average": "permute",
    "dare-ties": r"\(here: dare | ties\)",
    "task-arithmetic": "there is task_arithmetic",
    "TIES": "did you mean 'ties'",
}


@pytest.mark.parametrize("how", WRONG)
def test_a_knob_that_cannot_be_is_one_line(models, how: str) -> None:
    base, experts = models
    found = merganser.check(base, experts, how)
    assert not found.ok
    for attempt in (found.tell, lambda: merganser.merge(base, experts, how)):
        with pytest.raises(SentenceError) as error:
            attempt()
        assert WRONG[how].replace("\\", "") in str(error.value)
        assert "\n" not in str(error.value)


def test_a_pattern_is_judged_as_a_sentence_is(models) -> None:
    base, experts = models
    assert not merganser.check(base, experts, "ram", where={"*": {"ram": {"plus": "no"}}}).ok
    assert not merganser.check(base, experts, "average | scale", where={"*": {"scale": {"by": True}}}).ok
    for told in ({"*": {"trim": {"density": [0.2, 0.3]}}}, {"*": {"trim": {"density": {"a": 0.2, "b": 0.3}}}}):
        assert not merganser.check(base, experts, "average | trim", where=told).ok
        with pytest.raises(SentenceError):
            merganser.merge(base, experts, "average | trim", where=told)


@pytest.mark.parametrize(("how", "what"), [("regmean", "gram"), ("esm", "inputs")])
def test_an_ingredient_of_another_width_is_told_by_check(models, how: str, what: str) -> None:
    base, experts = models
    given = {e: {"layer.weight": torch.eye(5)} for e in experts}
    for attempt in (lambda: merganser.check(base, experts, how, ingredients={what: given}).tell(),
                    lambda: merganser.merge(base, experts, how, ingredients={what: given})):  # fmt: skip
        with pytest.raises(SentenceError, match=r"'layer.weight' is \[5, 5\], what enters the layer is 4 wide"):
            attempt()
    right = {what: {e: {"layer.weight": torch.eye(4)} for e in experts}}
    assert merganser.check(base, experts, how, ingredients=right).ok
    merganser.merge(base, experts, how, ingredients=right)


@pytest.mark.parametrize("how", ["esm", "regmean"])
def test_an_ingredient_that_is_not_finite_is_an_error_of_the_step(models, how: str) -> None:
    base, experts = models
    what = {"esm": "inputs", "regmean": "gram"}[how]
    given = {e: {"layer.weight": torch.full((4, 4), torch.nan)} for e in experts}
    with pytest.raises(MerganserError, match=how):
        merganser.merge(base, experts, how, ingredients={what: given})


@pytest.mark.parametrize("how", ["mask | average", "mask | tsv", "fisher"])
def test_a_scalar_has_an_entry_of_its_own_for_each_expert(models, how: str) -> None:
    """As CLIP's logit_scale: a mask an expert, or how much each of them knows of it."""
    base, experts = models
    what = "mask" if how.startswith("mask") else how
    given = {e: {n: torch.full(t.shape, float(e == "a") + 0.1) for n, t in base.items()} for e in experts}
    merged = merganser.merge(base, experts, how, ingredients={what: given})
    base, *others = (
        {n: t.reshape(-1) if n == "logit_scale" else t for n, t in w.items()} for w in (base, *experts.values())
    )
    given = {e: {n: t.reshape(base[n].shape) for n, t in w.items()} for e, w in given.items()}
    wide = merganser.merge(base, dict(zip("ab", others, strict=True)), how, ingredients={what: given})
    assert torch.equal(merged["logit_scale"].reshape(1), wide["logit_scale"])
    assert not torch.equal(wide["logit_scale"], base["logit_scale"])


@pytest.mark.parametrize("text", ["[1, 2]", "{", '"x"'])
@pytest.mark.parametrize("whose", ["base", "a"])
def test_a_config_that_is_none_is_told_before_the_work(models, tmp_path, text: str, whose: str) -> None:
    base, experts = models
    for who, weights in {"base": base, **experts}.items():
        merganser.save(weights, tmp_path / who)
    (tmp_path / whose / "config.json").write_text(text)
    given = (tmp_path / "base", [tmp_path / "a", tmp_path / "b"], "average")
    assert len(merganser.check(*given).errors) == 1, "told once"
    for attempt in (lambda: merganser.check(*given).tell(), lambda: merganser.merge(*given, into=tmp_path / "out")):
        with pytest.raises(WeightsError, match=r"config\.json: not (a )?JSON"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_recipe_tells_all_its_faults_at_once(tmp_path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'sed = 1\nnonsense = 2\nsentences = []\n[model]\nbase = "b"\nprecision = "fp8"\n[experts]\na = "a"\n'
    )
    with pytest.raises(RecipeError) as error:
        read_recipe(recipe)
    text = str(error.value)
    assert "\n" not in text
    for part in (
        "unknown key 'sed' (did you mean 'seed'?)",
        "unknown key 'nonsense'",
        "'sentences'",
        "'model.precision'",
        "lacks 'tasks'",
    ):
        assert part in text
    assert len(error.value.parts) == 5
    recipe.write_text(recipe.read_text().replace("[experts]", "[expert]"))
    with pytest.raises(RecipeError, match="did you mean 'experts'") as error:
        read_recipe(recipe)
    assert "lacks 'experts'" not in str(error.value), "told once"


def test_bf16_is_not_quite_as_wide_as_fp32() -> None:
    base = {"w": torch.tensor([3.4e38, 1.0])}
    with pytest.raises(WeightsError, match="does not fit torch"):
        merganser.merge(base, [{"w": torch.tensor([3.4e38, 2.0])}], "average", dtype="bfloat16")


def test_one_fault_of_several_experts_is_one_error(models) -> None:
    base, _ = models
    part = {"bias": base["bias"]}
    with pytest.raises(WeightsError) as error:
        merganser.merge(base, {"a": part, "b": part}, "average")
    assert "things are wrong" not in str(error.value)


def test_what_is_empty_is_not_the_current_folder(models, tmp_path, monkeypatch) -> None:
    base, experts = models
    merganser.save(base, tmp_path)
    merganser.save(experts["a"], tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    for given in (("", [tmp_path / "a"]), (tmp_path, [""]), (tmp_path, {"x": ""})):
        with pytest.raises(WeightsError, match="name is empty"):
            merganser.merge(*given, "average")
        assert not merganser.check(*given, "average").ok
    with pytest.raises(WeightsError, match="an expert has an empty name"):
        merganser.merge(base, {"": experts["a"]}, "average")
    for more, said in ((["fisher="], "one of them is empty"), (["fisher=a", "fisher=b"], "is given twice")):
        options = [part for one in more for part in ("--ingredient", one)]
        done = CliRunner().invoke(app, ["merge", str(tmp_path), "a", "--how", "fisher", *options, "--to", "out"])
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())


def test_a_merge_of_nothing_is_told(models) -> None:
    base, experts = models
    found = merganser.check(base, experts, "average", own=["*"])
    assert found.ok
    assert any("no tensor is merged" in one.what for one in found.warnings)
    with pytest.warns(UserWarning, match="no tensor is merged"):
        merged = merganser.merge(base, experts, "average", own=["*"])
    assert all(torch.equal(merged[n], base[n]) for n in base)


@pytest.mark.parametrize(
    "given",
    [
        {"own": 3}, {"own": [3]}, {"where": 3}, {"where": {"*": 3}}, {"where": {"*": {"average": 3}}}, {"ingredients": 3},
        {"into": 3}, {"vocabulary": 3}, {"part": 3}, {"seed": "x"}, {"dtype": 3}, {"stored": 3}, {"shard_size": []},
    ],
)  # fmt: skip
def test_an_argument_of_another_kind_is_one_line(models, given) -> None:
    base, experts = models
    assert not merganser.check(base, experts, "average", **given).ok
    with pytest.raises(MerganserError) as error:
        merganser.merge(base, experts, "average", **given)
    assert "\n" not in str(error.value)


def test_tensors_without_numbers_in_rows_are_told(models) -> None:
    base, experts = models
    for odd in (base["bias"].to_sparse(), base["bias"].to("meta")):
        for given in (({**base, "bias": odd}, experts), (base, {**experts, "a": {**base, "bias": odd}})):
            assert not merganser.check(*given, "average").ok
            with pytest.raises(WeightsError, match=r"'bias' is (sparse|on the meta device)"):
                merganser.merge(*given, "average")
    with pytest.raises(WeightsError, match="names are text"):
        merganser.merge({1: base["bias"]}, [{1: base["bias"]}], "average")
