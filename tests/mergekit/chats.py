"""Conversations, and what a chat template makes of them: ``python chats.py FOLDER`` in an environment that has jinja2."""

import json
import sys
from itertools import product
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

TOLD, ASKED, SAID, MORE = (
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": " Hi\nthere "},
    {"role": "assistant", "content": "Hello. "},
    {"role": "user", "content": "Bye"},
)
CHATS = {
    "asked": [ASKED],
    "told": [TOLD, ASKED],
    "again": [ASKED, SAID, MORE],
    "all": [TOLD, ASKED, SAID, MORE, SAID],
}


def rendered(template: str) -> dict[str, str]:
    """Return what a template makes of each conversation, with and without a place for an answer, as transformers has it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made = environment.from_string(template)
    return {
        f"{name}{'+' * answer}": made.render(
            messages=chat, add_generation_prompt=answer, bos_token="<s>", eos_token="</s>"
        )
        for (name, chat), answer in product(CHATS.items(), (False, True))
    }


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).glob("*.jinja"))
    print(json.dumps({file.stem: rendered(file.read_text()) for file in files}, indent=1))
