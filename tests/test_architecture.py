"""The rooms of the package are a ladder: a room imports only from those below it."""

import ast
from pathlib import Path

import timm_sape2

PACKAGE = Path(timm_sape2.__file__).parent
LADDER = [['ops'], ['positions'], ['models'], ['data'], ['trained'], ['training'], ['studies', 'hub'], ['commands']]
LEVEL = {room: level for level, rooms in enumerate(LADDER) for room in rooms}


def imported_rooms(path):
    """Rooms that a module imports from, also inside of functions."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = package[: len(package) - node.level + 1]
            parts = [*inside, *(node.module.split('.') if node.module else [])]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]


def test_all_rooms_are_on_it():
    assert {path.parent.name for path in PACKAGE.glob('*/__init__.py')} == LEVEL.keys()


def test_a_room_imports_from_those_below_alone():
    found = {
        (path.relative_to(PACKAGE).as_posix(), room)
        for room_of_path, level in LEVEL.items()
        for path in (PACKAGE / room_of_path).rglob('*.py')
        for room in imported_rooms(path)
        if room in LEVEL and room != room_of_path and LEVEL[room] >= level
    }
    assert not found


def test_what_all_rooms_share_imports_none_of_them():
    shared = [path for path in PACKAGE.glob('*.py') if path.name not in ('__init__.py', '__main__.py')]
    assert not {(path.name, room) for path in shared for room in imported_rooms(path) if room in LEVEL}


def test_what_all_studies_share_imports_no_room_of_theirs():
    studies = PACKAGE / 'studies'
    rooms = {path.parent.name for path in studies.glob('*/__init__.py')}
    assert rooms == {'accuracy', 'transfer', 'cost', 'bias_maps'}
    for name in ('study', 'runner', 'report'):
        tree = ast.parse((studies / f'{name}.py').read_text())
        modules = [node.module or '' for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        assert not rooms & {module.partition('.')[0] for module in modules}


def test_functions_of_studies_have_names_of_their_own():
    files = list((PACKAGE / 'studies').rglob('*.py'))
    trees = [ast.parse(path.read_text()) for path in files]
    functions = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert 'run_study' in functions
    assert [name for name in functions if functions.count(name) > 1] == []
    assert not set(functions) & {path.stem for path in files}
