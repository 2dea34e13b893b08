"""mergekit's YAML, run by our loop: `merge_config` merges, `plan` says what would be done, from headers alone."""

from .jobs import Plan as Plan
from .jobs import plan as plan
from .write import merge_config as merge_config
