"""The commands of `timm-sape2`, one file each. A new one is a file beside these and a name in `COMMANDS`."""

from .list_models import add_list
from .run import add_run
from .study import add_study
from .visualize import add_visualize

COMMANDS = (add_list, add_run, add_study, add_visualize)
