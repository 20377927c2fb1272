"""How tight the code is set: figures for each 100 lines of code, as CONTRIBUTING.md asks for them.

    python tests/measure_style.py                       # train.py, model.py, engine/
    python tests/measure_style.py sample.py engine/hf   # files and folders by name
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100


def docstring_lines(tree):
    """The numbers of the lines that docstrings take."""
    found = set()
    for node in ast.walk(tree):
        has_one = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if has_one and ast.get_docstring(node):
            found.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def comment_lines(text):
    """The numbers of the lines that have a comment and nothing else."""
    return {token.start[0] for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT and not token.line[:token.start[1]].strip()}


def function_lines(tree):
    """The numbers of the lines inside functions, without their docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.update(range(node.body[0].lineno, node.end_lineno + 1))
    return found - docstring_lines(tree)


def is_tuple_assignment(node):
    """`a, b = x, y`"""
    return (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple))


def measure(paths, whole_file):
    """{figure: value} over the files together. whole_file: air also counts outside functions."""
    code = characters = wide = tuples = conditionals = air = places = 0
    for path in paths:
        text = path.read_text(encoding='utf-8')
        lines = text.splitlines()
        tree = ast.parse(text)
        docstrings = docstring_lines(tree)
        comments = comment_lines(text)
        blank = {i for i, line in enumerate(lines, 1) if not line.strip()} - docstrings
        code_lines = set(range(1, len(lines) + 1)) - docstrings - comments - blank

        code += len(code_lines)
        characters += sum(len(lines[i - 1].rstrip()) for i in code_lines)
        wide += sum(len(line) > WIDTH for line in lines)
        tuples += sum(map(is_tuple_assignment, ast.walk(tree)))
        conditionals += sum(isinstance(node, ast.IfExp) for node in ast.walk(tree))

        counted = set(range(1, len(lines) + 1)) if whole_file else function_lines(tree)
        air += len(counted & (blank | comments))
        places += len(counted & code_lines)
    return {
        'characters in a line': characters / code,
        f'lines over {WIDTH}': 100 * wide / code,
        'tuple assignments': 100 * tuples / code,
        'conditionals': 100 * conditionals / code,
        'air': 100 * air / places,
        'lines of code': code,
    }


def main(names):
    groups = {name: name for name in names} or {
        'train.py': 'train.py', 'model.py': 'model.py', 'engine/': 'engine'}
    for title, name in groups.items():
        path = ROOT / name
        paths = sorted(path.glob('**/*.py')) if path.is_dir() else [path]
        figures = measure(paths, whole_file=name == 'train.py')
        print(f'{title:<28}', ', '.join(f'{what} {value:.1f}' for what, value in figures.items()))


if __name__ == '__main__':
    main(sys.argv[1:])
