import os
import sys

import pytest
import torch

import checkpoint
import sample
from dataloader import Tokenizer
from model import GPT, GPTConfig

END = '\n---------------\n'


def run(workspace, *arguments, **options):
    """The samples that sample.py prints after its settings."""
    shown = workspace.run('sample.py', '--device=cpu', '--max_new_tokens=40', '--out_dir=out-toy', *arguments, **options).stdout
    lines = shown.splitlines(keepends=True)
    while lines and lines[0].startswith(('settings:', '  ')):
        lines.pop(0)
    return ''.join(lines).split(END)[:-1]


def test_samples_continue_the_prompt_and_repeat(trained):
    first = run(trained, '--start=def f', '--num_samples=3')
    assert len(first) == len(set(first)) == 3
    assert all(text.startswith('def f') and len(text) == 45 for text in first)
    assert run(trained, '--start=def f', '--num_samples=3', '--max_batch=2') == first      # not of the batch
    assert run(trained, '--start=def f', '--num_samples=1') == first[:1]
    assert run(trained, '--start=def f', '--num_samples=1', '--seed=2') != first[:1]


def test_a_prompt_comes_from_a_file_and_greedy_is_one_text(trained):
    (trained.folder / 'prompt.txt').write_text('class A:\n')
    texts = run(trained, '--start=FILE:prompt.txt', '--temperature=0', '--num_samples=2', '--top_k=0')
    assert texts[0] == texts[1] and texts[0].startswith('class A:\n')


def test_a_prompt_beyond_the_context_is_read_from_its_end(trained):
    done = trained.run('sample.py', '--device=cpu', '--out_dir=out-toy', '--num_samples=1', '--max_new_tokens=5',
                       '--temperature=0', f'--start={"xyz " * 20}def f(')
    assert 'the prompt has 86 tokens, the model reads its last 32' in done.stderr
    long = ('xyz ' * 20 + 'def f(')
    short = run(trained, '--num_samples=1', '--max_new_tokens=5', '--temperature=0', f'--start={long[-32:]}')[0]
    assert done.stdout.split(END)[0].endswith(short[-5:])


def test_a_family_checkpoint_takes_the_tokenizer_of_its_dataset(trained):
    saved = torch.load(trained.folder / 'out-toy' / 'ckpt.pt', weights_only=True)
    (trained.folder / 'out-family').mkdir(exist_ok=True)
    family = {k: saved[k] for k in ('model', 'model_args', 'iter_num', 'best_val_loss', 'config')}
    torch.save(family, trained.folder / 'out-family' / 'ckpt.pt')
    assert run(trained, '--num_samples=2', '--out_dir=out-family') == run(trained, '--num_samples=2')
    torch.save(dict(family, config=dict(dataset='elsewhere')), trained.folder / 'out-family' / 'ckpt.pt')
    refused = trained.run('sample.py', '--out_dir=out-family', '--device=cpu', code=2).stderr
    assert '50257 tokens and the model' in refused and refused.count('\n') == 1


def test_ids_beyond_the_tokenizer_are_never_drawn(workspace):
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 10, 1, 2, 32))
    with torch.no_grad():
        model.lm_head.weight[3:] *= 50
    (workspace.folder / 'out-padded').mkdir()
    checkpoint.save_model(workspace.folder / 'out-padded', model, iter_num=1, best_val_loss=1.0, config={},
                          tokenizer=dict(tokenizer='char', vocab_size=3, chars='abc'))
    text = run(workspace, '--out_dir=out-padded', '--start=a', '--num_samples=1', '--temperature=3')[0]
    assert set(text) <= set('abc') and len(text) == 41


def test_lower_precision_says_nearly_the_same(trained):
    full = run(trained, '--num_samples=1', '--temperature=0')[0]
    for dtype in ('bfloat16', 'float16'):
        low = run(trained, '--num_samples=1', '--temperature=0', f'--dtype={dtype}')[0]
        assert low[:4] == full[:4]


@pytest.mark.parametrize('stop, pieces, shown, text', [
    ('', ['ab', 'c'], ['ab', 'c'], 'abc'),
    ('END', ['a', 'E', 'N', 'x', 'E', 'N', 'D', 'y'], None, 'aENx'),
    ('END', ['xE', 'N'], None, 'xEN'),                          # never completed
    ('END', ['xENDyENDz'], None, 'x')])
def test_a_sample_ends_before_its_stop_and_never_shows_it(monkeypatch, stop, pieces, shown, text):
    monkeypatch.setattr(sample, 'stop', stop)

    class Pieces:
        def decode_bytes(self, ids):
            return pieces[ids[0]].encode()
    one, live = sample.Text(Pieces()), []
    for i in range(len(pieces)):
        one.add(i, last=i == len(pieces) - 1)
        live.append(one.fresh())
        assert ''.join(live) == one.text[:len(''.join(live))]
    assert one.text == ''.join(live) == text and (shown is None or live == shown)


def test_half_a_character_waits_for_the_other_half(monkeypatch):
    class Bytes:
        def decode_bytes(self, ids):
            return bytes(ids)
    one, live = sample.Text(Bytes()), []
    data = 'a🙂é'.encode()
    for i, byte in enumerate(data):
        one.add(byte, last=i == len(data) - 1)
        live.append(one.fresh())
    assert live == ['a', '', '', '', '🙂', '', 'é']
    cut = sample.Text(Bytes())
    cut.add(data[1], last=True)                                 # a text that ends within a character
    assert cut.fresh() == '\N{REPLACEMENT CHARACTER}'


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no pseudo-terminals')
def test_on_a_terminal_one_sample_appears_as_it_grows(trained):
    import pty
    import subprocess
    screen, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, 'sample.py', '--out_dir=out-toy', '--device=cpu', '--num_samples=1',
                                '--max_new_tokens=300', '--start=def '], cwd=trained.folder, stdout=terminal, stderr=subprocess.DEVNULL)
    os.close(terminal)
    reads = []
    while True:
        try:
            piece = os.read(screen, 1000)
        except OSError:                                         # the other end is closed
            break
        if not piece:
            break
        reads.append(piece)
    assert process.wait() == 0 and len(reads) > 20
    piped = run(trained, '--num_samples=1', '--max_new_tokens=300', '--start=def ')[0]
    assert piped in b''.join(reads).decode().replace('\r\n', '\n')


def test_gpt2_weights_of_a_folder_speak_gpt2(workspace):
    try:
        Tokenizer()
    except RuntimeError as error:
        pytest.skip(str(error))
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64)).save_pretrained(
        workspace.folder / 'speaker')
    texts = run(workspace, '--init_from=speaker', '--num_samples=2', '--start=Hello there', '--max_new_tokens=80')
    assert len(set(texts)) == 2 and all(text.startswith('Hello there') for text in texts)
    assert len(run(workspace, '--init_from=speaker', '--start=', '--num_samples=1')) == 1    # begins a document
