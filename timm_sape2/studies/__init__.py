"""Studies that compare position encodings. A new one is a file in one of the rooms and a name in `STUDIES`."""

from .accuracy.ablation import Ablation
from .accuracy.compare import Compare
from .cost.attention import AttentionCost
from .cost.overhead import Overhead
from .study import Study as Study
from .transfer.consistency import Consistency
from .transfer.equivariance import Equivariance
from .transfer.resolution import Resolution

STUDIES: dict[str, type[Study]] = {
    study.name: study for study in (Compare, Equivariance, Consistency, Resolution, Ablation, Overhead, AttentionCost)
}
