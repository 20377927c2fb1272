"""The directions of imports, and what engine/ leaves to the scripts."""

import ast
import subprocess
import sys

import pytest
from harness import ROOT

SCRIPTS = ('train', 'sample', 'bench', 'evaluate', 'export', 'plot', 'scaling')
ABOVE_ENGINE = {'model', 'configurator', 'console', *SCRIPTS, *(path.stem for path in ROOT.glob('*.py'))}
FILES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path
         for path in (*ROOT.glob('*.py'), *ROOT.glob('engine/**/*.py'), *ROOT.glob('data/*/*.py'),
                      *ROOT.glob('studies/*.py'))}
ENGINE = sorted(name for name in FILES if name.startswith('engine.') and not name.endswith('__init__'))


def parse(name):
    return ast.parse(FILES[name].read_text(encoding='utf-8'))


def imported_modules(tree, package=''):
    """Every module that a file imports, at any depth, with the names imported from it: they may be modules too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = '.'.join(filter(None, (package if node.level else '', node.module)))
            yield from (module, *(f'{module}.{alias.name}' for alias in node.names))


def imports_of(name):
    """The files of the project that the file `name` imports."""
    package = name.rpartition('.')[0]
    return {module for module in imported_modules(parse(name), package) if module in FILES} - {name}


def find_circle(graph):
    """A list of names in which each imports the next and the last the first, or None."""
    finished = set()

    def visit(name, path):
        if name in path:
            return path[path.index(name):]
        if name in finished:
            return None
        circle = next(filter(None, (visit(other, [*path, name]) for other in sorted(graph[name]))), None)
        finished.add(name)
        return circle
    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


GROUND = {'errors', 'log', 'atomic_files', 'device', 'distributed', 'tokenizer', 'positions',
          'model_checks', 'attention'}
# What the files of each wing may import of other wings: a whole wing, or one of its files.
MAY_IMPORT = {
    'dataloader': set(),
    'hf': set(),
    'generation': set(),
    'metrics': set(),
    'prepare': {'dataloader.token_files'},
    'evaluation': {'generation.kv_cache'},
    'checkpoint': set(),
    'training': {'checkpoint', 'metrics', 'dataloader'},
}
ALSO_MAY_IMPORT = {'checkpoint.load_model': {'dataloader.batches', 'hf.tokenizer_json'}}


@pytest.mark.parametrize('name', ENGINE)
def test_each_wing_imports_only_what_the_table_allows(name):
    """Ground files may be imported by all, and import only each other."""
    own = name.removeprefix('engine.')
    wing = own.partition('.')[0]
    assert wing in MAY_IMPORT or own in GROUND, 'a wing or a ground file that the table does not have'
    allowed = MAY_IMPORT.get(wing, set()) | ALSO_MAY_IMPORT.get(own, set())
    for module in imports_of(name):
        other = module.removeprefix('engine.')
        other_wing = other.partition('.')[0]
        is_fine = other in GROUND or other_wing == wing or {other, other_wing} & allowed
        assert is_fine, f'{name} imports {module}'


def test_the_model_imports_only_four_files_before_it_is_used():
    at_the_top = {module for node in parse('model').body if isinstance(node, ast.ImportFrom)
                  for module in imported_modules(ast.Module([node], []))}
    assert {module for module in at_the_top if module in FILES} <= {
        'engine.attention', 'engine.positions', 'engine.model_checks', 'engine.errors'}


@pytest.mark.parametrize('wing', MAY_IMPORT)
def test_a_wing_says_what_it_is_for_and_imports_nothing_of_its_own(wing):
    """Re-exports in __init__.py would import PyTorch where nobody asked for it."""
    tree = parse(f'engine.{wing}.__init__')
    assert ast.get_docstring(tree) and len(tree.body) == 1


WITHOUT_TORCH = sorted(
    {'plot', 'export', 'configurator', 'console', 'engine.errors', 'engine.atomic_files', 'engine.tokenizer',
     'engine.dataloader.token_files', 'engine.dataloader.window_order', 'engine.metrics.metrics_file'}
    | {name for name in FILES if name.startswith('engine.prepare.') and not name.endswith('__init__')}
    | {name for name in FILES if name.startswith('data.')})


def test_what_needs_no_torch_does_not_wait_for_it():
    """`python data/NAME/prepare.py` and plot.py start in a fraction of the seconds that PyTorch takes."""
    code = ('import importlib.util, sys\n'
            'for path in sys.argv[1:]:\n'
            '    spec = importlib.util.spec_from_file_location("imported", path)\n'
            '    spec.loader.exec_module(importlib.util.module_from_spec(spec))\n'
            '    assert "torch" not in sys.modules, path\n')
    paths = [str(FILES[name]) for name in WITHOUT_TORCH]
    subprocess.run([sys.executable, '-c', code, *paths], cwd=ROOT, check=True)


@pytest.mark.parametrize('name', ENGINE)
def test_engine_imports_nothing_above_it(name):
    found = {module.partition('.')[0] for module in imported_modules(parse(name), 'engine')}
    assert not found & ABOVE_ENGINE
    assert found <= {*sys.stdlib_module_names, 'engine', 'torch', 'numpy', 'filelock', 'tqdm', 'tiktoken', 'transformers',
                     'huggingface_hub', 'pyarrow', 'datasets', 'wandb', 'safetensors', 'tokenizers'}
    assert 'importlib' not in found and not calls(name, '__import__')


def test_no_imports_go_in_a_circle():
    """Those inside functions count too."""
    graph = {name: imports_of(name) for name in FILES}
    assert graph['train'] >= {'model', 'configurator', 'console', 'engine.checkpoint.run_folder'}
    assert 'engine.generation.generate' in graph['model']
    assert find_circle(graph) is None


def test_a_circle_would_be_found():
    assert find_circle({'a': {'b'}, 'b': {'c', 'd'}, 'c': set(), 'd': {'b'}}) == ['b', 'd']
    tree = ast.parse('def f():\n    from engine.hf import weights\n    import train as t')
    assert {'engine.hf.weights', 'train'} <= set(imported_modules(tree))


def test_only_bench_imports_another_script():
    """bench.py times the step of train.py; a copy of it would drift."""
    found = {(name, script) for name in FILES for script in imports_of(name) & set(SCRIPTS)}
    assert found == {('bench', 'train')}


def calls(name, function):
    return [node for node in ast.walk(parse(name)) if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name) and node.func.id == function]


@pytest.mark.parametrize('name', ENGINE)
def test_engine_prints_nothing_and_reads_no_command_line(name):
    """A progress bar of tqdm is allowed."""
    assert not calls(name, 'print')
    attributes = {(node.value.id, node.attr) for node in ast.walk(parse(name))
                  if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    assert not attributes & {('sys', 'argv'), ('sys', 'orig_argv')}
    assert not {'sys.argv', 'argparse'} & set(imported_modules(parse(name)))


@pytest.mark.parametrize('name', ENGINE)
def test_engine_does_nothing_at_import(name):
    """A file has only a docstring, imports, constants, functions and classes."""
    for node in parse(name).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign,
                                                 ast.FunctionDef, ast.ClassDef)), f'line {node.lineno}'
