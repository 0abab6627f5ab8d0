"""The commands of `timm-sape2`, one file each. A new one is a file beside these and a name in `COMMANDS`."""

from .export import add_export
from .hub import add_hub
from .list_models import add_list
from .predict import add_predict
from .run import add_run
from .study import add_study
from .train import add_train
from .validate import add_validate
from .visualize import add_visualize

COMMANDS = (add_list, add_train, add_run, add_validate, add_predict, add_visualize, add_export, add_study, add_hub)
