"""Run mergekit itself: ``python oracle.py FOLDER CONFIG.yml ...`` in an environment that has mergekit.

FOLDER holds the models under the names that the configs use; the merge of CONFIG.yml goes to FOLDER/out/CONFIG.
"""

import os
import sys
from pathlib import Path


def main(folder: str, *configs: str) -> None:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    os.chdir(folder)
    for path in map(Path, configs):
        config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
        options = MergeOptions(quiet=True, random_seed=0, write_model_card=False)
        run_merge(config, f"out/{path.stem}", options=options)


if __name__ == "__main__":
    main(*sys.argv[1:])
