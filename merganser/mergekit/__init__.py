"""mergekit's YAML, run by our loop: `merge_config` merges, `plans` says what would be done, from headers alone."""

from .chain import plans as plans
from .jobs import Plan as Plan
from .write import merge_config as merge_config
