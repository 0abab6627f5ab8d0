"""A model as a file of ONNX, which is compared with the model before it is there."""

import importlib.util
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed
from torch import Tensor
from torch.export import Dim

from .._files import atomic_write
from ..models.flops import count_parameters
from .opening import TrainedModel, evaluation_mode

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
MOST_BYTES = 2**31 - 2**20  # a file of ONNX is one message of protobuf
TOLERANCE = 1e-2  # of the largest output: 1e-6 from rounding, 1e-3 where older versions of onnxruntime resample


class Exported(NamedTuple):
    """A file of ONNX that was compared with its model."""

    inputs: tuple[int | str, ...]
    """Shape of its input 'images'; what is free has a name."""

    opset: int

    sizes: list[tuple[int, int]]
    """Heights and widths of the images that the two were compared on, in batches of 1 and of 3."""

    difference: float
    """Largest difference of two outputs, relative to the largest output."""


def export_onnx(trained: TrainedModel, path: Path) -> Exported:
    """Write a model as ONNX, and compare what onnxruntime makes of it with the model itself.

    The batch is of any size. So are the images, if the model was created with `dynamic_img_size=True`: of every size
    that the patches divide, or of any at all with `dynamic_img_pad=True`. The file knows the names of the classes and
    how images are prepared, see `metadata`.

    Args:
        trained: The model, on the CPU and in float32.
        path: The file, which is written after the comparison alone.

    Raises:
        ValueError: If packages are missing, the model is too large for a file or cannot be exported, or the file
            computes something else than the model. No file is written then.
    """
    check_packages()
    model = trained.model
    num_bytes = 4 * count_parameters(model)
    if num_bytes > MOST_BYTES:
        raise ValueError(f'the weights have {num_bytes / 1e9:.1f} GB, but a file of ONNX holds 2 GB at most')
    with evaluation_mode(model), atomic_write(path) as temporary:
        temporary.unlink(missing_ok=True)
        program = onnx_program(trained)
        program.model.metadata_props.update(metadata(trained))
        program.save(str(temporary), external_data=False)
        sizes = sizes_to_compare(trained)
        inputs, difference = compare(trained, temporary, sizes)
    return Exported(inputs, program.model.opset_imports[''], sizes, difference)


def check_packages() -> None:
    """Raise a ValueError that says what to install if something is missing to export."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"export needs {', '.join(missing)}: pip install 'timm_sape2[export]'")


def onnx_program(trained: TrainedModel) -> Any:
    """Return the model as a program of ONNX.

    Raises:
        ValueError: If it cannot be exported.
    """
    images = noise(2, trained.data_config['input_size'])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return torch.onnx.export(
                trained.model,
                (images,),
                dynamo=True,
                dynamic_shapes=(free_dimensions(trained.model),),
                input_names=['images'],
                output_names=['logits' if trained.model.num_classes else 'features'],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition('\n')[0]
        raise ValueError(f'the model cannot be exported: {reason}') from error


def takes_any_size(model: Any) -> bool:
    """Tell whether images of other sizes than the native one can be given to a model and to its file."""
    return getattr(model, 'dynamic_img_size', False) and isinstance(model.patch_embed, PatchEmbed)


def free_dimensions(model: Any) -> dict[int, Any]:
    """Return the dimensions of images (B, C, height, width) that are free, as torch.export takes them."""
    if not takes_any_size(model):
        return {0: Dim('batch')}
    rows, columns = model.patch_embed.patch_size
    if model.patch_embed.dynamic_img_pad:
        return {0: Dim('batch'), 2: Dim('height', min=2 * rows), 3: Dim('width', min=2 * columns)}
    return {0: Dim('batch'), 2: rows * Dim('rows', min=2), 3: columns * Dim('columns', min=2)}


def sizes_to_compare(trained: TrainedModel) -> list[tuple[int, int]]:
    """Return heights and widths of images for the comparison: the native one, and a few others if it may be any."""
    model, (_, height, width) = trained.model, trained.data_config['input_size']
    if not takes_any_size(model):
        return [(height, width)]
    rows, columns = model.patch_embed.patch_size
    sizes = [(height, width), (height + rows, width + 2 * columns), (2 * rows, 3 * columns)]
    return [*sizes, (height + 1, width + 2)] if model.patch_embed.dynamic_img_pad else sizes


def metadata(trained: TrainedModel) -> dict[str, str]:
    """Return what a file says beside the graph: JSON of 'class_names' (if there are any) and of 'preprocessing'."""
    said: dict[str, Any] = {'preprocessing': trained.data_config}
    if trained.class_names is not None:
        said['class_names'] = trained.class_names
    return {key: json.dumps(value) for key, value in said.items()}


def compare(trained: TrainedModel, path: Path, sizes: Iterable[tuple[int, int]]) -> tuple[tuple[int | str, ...], float]:
    """Compare a file with its model, on noise in batches of 1 and of 3 images.

    Args:
        trained: The model.
        path: The file.
        sizes: Heights and widths of the images.

    Returns:
        Shape of its input, and the largest difference of two outputs relative to the largest output.

    Raises:
        ValueError: If they differ.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=['CPUExecutionProvider'])
    difference = 0.0
    for height, width in sizes:
        for batch in (1, 3):
            images = noise(batch, (trained.data_config['input_size'][0], height, width))
            with torch.inference_mode():
                expected = trained.model(images)
            (output,) = session.run(None, {'images': images.numpy()})
            error = float((torch.from_numpy(output) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
            if not error <= TOLERANCE:
                raise ValueError(
                    f'onnxruntime computes something else than torch, by {error:.1e} of the largest output for {batch} '
                    f'images of {height}x{width}; other versions of torch, onnxscript and onnxruntime may do better'
                )
            difference = max(difference, error)
    return tuple(session.get_inputs()[0].shape), difference


def noise(batch: int, shape: Sequence[int]) -> Tensor:
    """Return images that are normalized noise, always the same."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
