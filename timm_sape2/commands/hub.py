"""The command `timm-sape2 hub`: push, pull, verify, card."""

import argparse
import tempfile
from pathlib import Path

from ..hub.card import write_card
from ..hub.package import write_package
from ..hub.pull import pull
from ..hub.push import check_can_push, push_folder
from ..hub.verify import verify
from ..trained.config import read_config
from ..trained.opening import REPOSITORY, split_revision
from .model_arguments import add_model_arguments, open_named_model
from .parser import Commands


def add_hub(commands: Commands) -> None:
    """Add `hub` and its subcommands."""
    parser = commands.add_parser(
        'hub',
        help='publish models on the Hugging Face Hub, fetch and verify them',
        description='Publish models on the Hugging Face Hub, fetch and verify them.',
        epilog="""\
examples:
  timm-sape2 hub push output/train/NAME/model_best.pth.tar --to OWNER/NAME
  timm-sape2 hub verify OWNER/NAME
  timm-sape2 hub pull OWNER/NAME FOLDER

Pushing, and all that is private, needs a token: `hf auth login`, or the
variable HF_TOKEN. In Python, after `import timm_sape2`:
  timm.create_model('hf-hub:OWNER/NAME', pretrained=True)""",
    )
    subcommands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for add_command in (add_push, add_pull, add_verify, add_card):
        add_command(subcommands)


def add_push(commands: Commands) -> None:
    """Add `hub push`."""
    parser = commands.add_parser(
        'push',
        help='publish a checkpoint',
        description="""\
Publish a checkpoint: its weights alone, as safetensors, with configuration,
recipe and model card. Of the folder of a run the last checkpoint is taken; name
model_best.pth.tar in it for the best one. Before anything is sent, the model is
loaded again from what will be sent, and must give the same logits.""",
        epilog="""\
examples:
  timm-sape2 hub push model_best.pth.tar --to OWNER/NAME --dry-run
  timm-sape2 hub push model_best.pth.tar --to OWNER/NAME --private
  timm-sape2 hub push model_best.pth.tar --to OWNER/NAME \\
      --metrics metrics.json --class-names classes.txt

The card has the accuracy that the checkpoint was saved with, or what
`timm-sape2 validate CHECKPOINT ... --json metrics.json` measured. A name
such as vit_small_sape2.flowers says that `flowers` is the training data.""",
    )
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT', help='file, folder of a run or with config.json, or name that has weights'
    )
    parser.add_argument('--to', metavar='OWNER/NAME', required=True, help='the repository, made if it is not there')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to commit to, made if not there (default: main)')
    parser.add_argument('--dry-run', action='store_true', help='write the folder, send nothing')
    parser.add_argument('--folder', metavar='DIR', type=Path, help='keep what is sent here (dry run: output/hub/NAME)')
    parser.add_argument('--metrics', metavar='FILE', type=Path, help='what validate --json wrote for these weights')
    parser.add_argument(
        '--recipe',
        metavar='FILE',
        type=Path,
        help='its train.yaml, and pretrain.yaml if there is one beside it (default: of the checkpoint)',
    )
    parser.add_argument('--class-names', metavar='FILE', type=Path, help='names of the classes, one a line')
    parser.add_argument('--license', metavar='NAME', help="license of the weights (default: the model's, apache-2.0)")
    add_model_arguments(parser, img_size=False)
    parser.set_defaults(command=push)


def push(arguments: argparse.Namespace) -> None:
    """Package a checkpoint and send it."""
    repo_id = arguments.to
    check_repository_name(repo_id)
    names = read_class_names(arguments.class_names) if arguments.class_names else None
    if not arguments.dry_run:
        check_can_push(repo_id, arguments.private)
    trained = open_named_model(arguments, arguments.checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path('output', 'hub', repo_id.partition('/')[2]) if arguments.dry_run else Path(temporary)
        folder = arguments.folder or kept
        write_package(folder, trained, repo_id, arguments.license, arguments.metrics, arguments.recipe, names)
        config = read_config(folder / 'config.json')
        license = config['pretrained_cfg'].get('license')
        print(f'Packed the {trained.weights} of {arguments.checkpoint}; they load and give the same logits.')
        print(f'The card gives them the license {license}; --license NAME changes that.')
        if not config.get('label_names'):
            print('Its classes have no names, as the checkpoint has none; --class-names FILE gives them.')
        if arguments.dry_run:
            print(f'Nothing was sent. The folder is {folder}, its card {folder / "README.md"}')
            return
        address = push_folder(folder, repo_id, arguments.private, arguments.revision)
    at = f'{repo_id}@{arguments.revision}' if arguments.revision else repo_id
    print(f"""\
Pushed: {address}
Load it, after `import timm, timm_sape2`:
  timm.create_model('hf-hub:{at}', pretrained=True)
Verify it:
  timm-sape2 hub verify {at}""")


def add_pull(commands: Commands) -> None:
    """Add `hub pull`."""
    parser = commands.add_parser(
        'pull',
        help='copy a model to a folder',
        description="Copy a model from the Hub to a folder, compared with the Hub's record.",
        epilog="""\
examples:
  timm-sape2 hub pull OWNER/NAME                to the folder NAME
  timm-sape2 hub pull OWNER/NAME@v1.0 models/1  a tag, branch or commit

The folder loads without the Hub, after `import timm_sape2`:
  timm.create_model('local-dir:FOLDER', pretrained=True)""",
    )
    parser.add_argument('source', metavar='OWNER/NAME[@REVISION]', help='the model')
    parser.add_argument('folder', metavar='FOLDER', nargs='?', type=Path, help='where to (default: NAME)')
    parser.add_argument('--overwrite', action='store_true', help='replace files that differ')
    parser.set_defaults(command=run_pull)


def run_pull(arguments: argparse.Namespace) -> None:
    """Pull a model and say where it is."""
    check_repository_name(split_revision(arguments.source)[0])
    folder = pull(arguments.source, arguments.folder, arguments.overwrite)
    print(f"Pulled {arguments.source}. timm.create_model('local-dir:{folder}', pretrained=True) loads it.")


def add_verify(commands: Commands) -> None:
    """Add `hub verify`."""
    parser = commands.add_parser(
        'verify',
        help='check that a model is what was published',
        description="""\
Compare each file of a model with the checksum that the Hub has of it, and the
model's logits for a stored image with those of its card. Loading a model
notices neither a byte that changed on the disk nor one that changed on the
way.""",
        epilog="""\
examples:
  timm-sape2 hub verify OWNER/NAME                  what timm loads, the cache
  timm-sape2 hub verify OWNER/NAME --folder FOLDER  what was pulled""",
    )
    parser.add_argument('source', metavar='OWNER/NAME[@REVISION]', help='the model')
    parser.add_argument('--folder', metavar='FOLDER', type=Path, help='where it was pulled to (default: the cache)')
    parser.set_defaults(command=run_verify)


def run_verify(arguments: argparse.Namespace) -> None:
    """Verify a model and say what was found."""
    check_repository_name(split_revision(arguments.source)[0])
    folder, difference = verify(arguments.source, arguments.folder)
    print(f"{arguments.source} is as published: files in {folder} as in the Hub's record, logits of the probe image")
    print(f'as in the model card (largest difference {difference:.1e} of the largest).')


def add_card(commands: Commands) -> None:
    """Add `hub card`."""
    parser = commands.add_parser(
        'card',
        help='write the model card of a folder anew',
        description='Write README.md of folders from config.json, recipes and metrics.json.',
        epilog="""\
examples:
  timm-sape2 hub card hub_configs/*""",
    )
    parser.add_argument('folders', metavar='FOLDER', nargs='+', type=Path, help='folder with config.json')
    parser.set_defaults(command=write_cards)


def write_cards(arguments: argparse.Namespace) -> None:
    """Write the cards of folders."""
    for folder in arguments.folders:
        write_card(folder)


def check_repository_name(repo_id: str) -> None:
    """Raise a ValueError for what cannot be the name of a repository."""
    if not REPOSITORY.fullmatch(repo_id):
        raise ValueError(f'the name of a repository is OWNER/NAME, not {repo_id!r}')


def read_class_names(path: Path) -> list[str]:
    """Read the names of classes, one a line."""
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f'--class-names {path} is not text in UTF-8') from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f'--class-names {path} is empty')
    return names
