"""Whether the files of a model are what the Hub has, and the model gives the logits of its card.

Neither timm nor the client of the Hub notices a byte that changed, be it on the disk, on the way or on the Hub.
"""

from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download
from PIL import Image

from ..trained.errors import explained
from ..trained.opening import open_model, split_revision
from .files import FILES, compare_files, hub_api
from .probe import PROBE, TOLERANCE, largest_difference, probe_logits


def verify(source: str, folder: Path | None = None) -> tuple[Path, float]:
    """Compare all files of a model with the Hub's record, and its logits for the probe image with its card.

    Args:
        source: OWNER/NAME or OWNER/NAME@REVISION.
        folder: Where the model was pulled to, by default the cache that timm loads it from.

    Returns:
        Where the files are, and the largest difference of the logits as a share of the largest one.

    Raises:
        ValueError: If a file or the logits differ, there is nothing to compare with, or the Hub cannot be reached.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f'{folder} is not a folder; `timm-sape2 hub pull {source} {folder}` makes it')
    repo_id, revision = split_revision(source)
    with explained(source):
        commit = hub_api().model_info(repo_id, revision=revision).sha
        record = list(hub_api().list_repo_tree(repo_id, revision=commit))
        if folder is None:
            folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=list(FILES)))
    different = compare_files(folder, record)
    if different:
        raise ValueError(
            f'{source}: {", ".join(different)} in {folder} {"differs" if len(different) == 1 else "differ"} '
            "from the Hub's record; delete what differs and download it again"
        )
    return folder, check_logits(folder, source)


def check_logits(folder: Path, source: str) -> float:
    """Compare the logits for the probe image of a folder with those that its model card has.

    Args:
        folder: The folder.
        source: What to call it.

    Returns:
        The largest difference as a share of the largest logit.

    Raises:
        ValueError: If they differ by more than rounding does, or the probe or the card is not there.
    """
    try:
        card = ModelCard((folder / 'README.md').read_text(encoding='utf-8'))
        with Image.open(folder / PROBE) as image:
            logits = probe_logits(open_model(f'local-dir:{folder}'), image)
        expected = card.data.to_dict().get('probe', {}).get('logits', {})
    except FileNotFoundError as error:
        raise ValueError(
            f'{source}: nothing to compare the logits with, there is no {Path(error.filename).name}'
        ) from error
    difference = largest_difference(logits, expected)
    if not difference <= TOLERANCE:
        raise ValueError(
            f'{source}: the logits of {PROBE} differ from those of the model card by {difference:.1e} of the largest; '
            'the weights are not those that the card describes'
        )
    return difference
