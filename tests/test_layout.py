"""The directions of imports, and what engine/ leaves to the scripts."""

import ast
import subprocess
import sys

import pytest
from harness import ROOT

SCRIPTS = ('train', 'sample', 'chat', 'bench', 'evaluate', 'export', 'plot', 'scaling')
ABOVE_ENGINE = {'model', 'configurator', 'console', *SCRIPTS, *(p.stem for p in ROOT.glob('*.py'))}

# {module name: its file} of the whole project
PATTERNS = ('*.py', 'engine/**/*.py', 'data/*/*.py', 'studies/*.py')
FILES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path
         for pattern in PATTERNS for path in ROOT.glob(pattern)}
ENGINE = sorted(name for name in FILES
                if name.startswith('engine.') and not name.endswith('__init__'))

# Ground files may be imported by all, and import only each other.
GROUND = {'errors', 'log', 'atomic_files', 'device', 'distributed', 'tokenizer', 'positions',
          'attention', 'model_checks', 'downloads', 'chat_layout', 'plain_pickle', 'meta_pkl'}

# What the files of each wing may import of other wings: a whole wing, or one of its files.
MAY_IMPORT = {
    'dataloader': set(),
    'hf': set(),
    'generation': set(),
    'metrics': set(),
    'prepare': {'dataloader.token_files'},
    'evaluation': {'generation.kv_cache'},
    'chat': {'generation'},
    'checkpoint': set(),
    'training': {'checkpoint', 'metrics', 'dataloader'},
}
ALSO_MAY_IMPORT = {'checkpoint.load_model': {'dataloader.batches', 'hf.tokenizer_json'}}

# What engine/ may import of others, beside Python's standard library.
PACKAGES = {'torch', 'numpy', 'filelock', 'tqdm', 'tiktoken', 'transformers', 'huggingface_hub',
            'pyarrow', 'datasets', 'wandb', 'safetensors', 'tokenizers', 'requests'}

# What starts without PyTorch.
WITHOUT_TORCH = sorted(
    {
        'plot',
        'export',
        'configurator',
        'console',
        'engine.errors',
        'engine.atomic_files',
        'engine.downloads',
        'engine.meta_pkl',
        'engine.plain_pickle',
        'engine.tokenizer',
        'engine.dataloader.file_formats',
        'engine.dataloader.token_files',
        'engine.dataloader.window_order',
        'engine.metrics.metrics_file',
        'engine.checkpoint.kept',
        'engine.generation.prompt_file',
        'engine.generation.text',
    }
    | {name for name in ENGINE if name.startswith('engine.prepare.')}
    | {name for name in FILES if name.startswith('data.')}
)


# Reading the code

def parse(name):
    return ast.parse(FILES[name].read_text(encoding='utf-8'))


def imported_modules(tree, package=''):
    """Every module that a file imports, at any depth, and the names imported from it.

    Those names may be modules too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = [node.module]
            if node.level:
                parts.insert(0, package)
            module = '.'.join(filter(None, parts))
            yield module
            for alias in node.names:
                yield f'{module}.{alias.name}'


def imports_of(name):
    """The files of the project that the file `name` imports."""
    package = name.rpartition('.')[0]
    modules = set(imported_modules(parse(name), package))
    return modules & FILES.keys() - {name}


def calls(name, function):
    """The calls of a function in the file `name`."""
    return [node for node in ast.walk(parse(name))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == function]


def find_circle(graph):
    """A list of names in which each imports the next and the last the first, or None."""
    finished = set()

    def visit(name, path):
        if name in path:
            return path[path.index(name):]
        if name in finished:
            return None
        for other in sorted(graph[name]):
            circle = visit(other, [*path, name])
            if circle:
                return circle
        finished.add(name)
        return None

    for name in sorted(graph):
        circle = visit(name, [])
        if circle:
            return circle
    return None


# Who imports whom

@pytest.mark.parametrize('name', ENGINE)
def test_each_wing_imports_only_what_the_table_allows(name):
    own = name.removeprefix('engine.')
    wing = own.partition('.')[0]
    is_known = wing in MAY_IMPORT or own in GROUND
    assert is_known, 'a wing or a ground file that the table does not have'

    allowed = MAY_IMPORT.get(wing, set()) | ALSO_MAY_IMPORT.get(own, set())
    for module in imports_of(name):
        other = module.removeprefix('engine.')
        other_wing = other.partition('.')[0]
        is_fine = other in GROUND or other_wing == wing or {other, other_wing} & allowed
        assert is_fine, f'{name} imports {module}'


def test_the_model_imports_only_two_files_before_it_is_used():
    at_the_top = set()
    for node in parse('model').body:
        if isinstance(node, ast.ImportFrom):
            at_the_top.update(imported_modules(ast.Module([node], [])))
    of_the_project = at_the_top & FILES.keys()
    assert of_the_project <= {
        'engine.attention', 'engine.positions', 'engine.model_checks', 'engine.errors'}


@pytest.mark.parametrize('wing', MAY_IMPORT)
def test_a_wing_says_what_it_is_for_and_imports_nothing_of_its_own(wing):
    """Re-exports in __init__.py would import PyTorch where nobody asked for it."""
    tree = parse(f'engine.{wing}.__init__')
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_what_needs_no_torch_does_not_wait_for_it():
    """`python data/NAME/prepare.py` and plot.py start in a fraction of PyTorch's seconds."""
    code = '''
import importlib.util, sys
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("imported", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "torch" not in sys.modules, path
'''
    paths = [str(FILES[name]) for name in WITHOUT_TORCH]
    subprocess.run([sys.executable, '-c', code, *paths], cwd=ROOT, check=True)


@pytest.mark.parametrize('name', ENGINE)
def test_engine_imports_nothing_above_it(name):
    found = {module.partition('.')[0] for module in imported_modules(parse(name), 'engine')}
    assert not found & ABOVE_ENGINE
    assert found <= {'engine', *PACKAGES, *sys.stdlib_module_names}
    assert 'importlib' not in found
    assert not calls(name, '__import__')


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


# What engine/ leaves to the scripts

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
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    for node in parse(name).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or isinstance(node, allowed), f'line {node.lineno}'
