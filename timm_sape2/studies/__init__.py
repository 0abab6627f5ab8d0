"""Studies that compare position encodings. A new one is a file beside these and a line in `STUDIES`."""

from .ablation import Ablation
from .compare import Compare
from .equivariance import Equivariance
from .overhead import Overhead
from .resolution import Resolution
from .study import Study as Study

STUDIES: dict[str, type[Study]] = {
    study.name: study for study in (Compare, Equivariance, Resolution, Ablation, Overhead)
}
