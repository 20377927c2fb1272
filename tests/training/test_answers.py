"""Whole runs on prompts and answers of different lengths, of which only the answers count."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import CAN_FORK, script_settings

import sample
from engine import chat_layout
from engine.checkpoint.load_model import load_model
from engine.dataloader import batches as dataloader
from engine.dataloader.batches import TokenDataset
from engine.prepare.dataset_writer import Piece, dataset_writer
from engine.tokenizer import Tokenizer, char_spec
from model import GPT

LAYOUT = chat_layout.ChatLayout()
SPEC = char_spec({*'abcdefghij<|>', *'systemuserassistantend'}, ends_documents=True)
FLAGS = ['--dataset=answers', '--documents=whole', '--dropout=0.0', '--max_iters=8',
         '--lr_decay_iters=8', '--block_size=96']


def conversation(i):
    """The segments of question number i, whose answer is its letters backwards, i % 5 + 1 times."""
    question = ''.join('abcdefghij'[int(digit)] for digit in str(i * i))
    answer = question[::-1] * (i % 5 + 1)
    turns = [chat_layout.Turn('user', question), chat_layout.Turn('assistant', answer)]
    return LAYOUT.segments(turns)


def pieces():
    for i in range(100):
        split = 'val' if i % 5 == 4 else 'train'
        *before, last = conversation(i)
        for text, counts in before:
            yield Piece(split, text, False, counts)
        yield Piece(split, last.text, True, last.counts)


@pytest.fixture(scope='module')
def place(workspace):
    """The workspace with data/answers, and a run on it in out-answers."""
    folder = workspace.folder / 'data' / 'answers'
    if not folder.exists():
        with dataset_writer(folder, SPEC, has_masks=True, chat=LAYOUT) as writer:
            writer.write(pieces(), Tokenizer(SPEC).encode_to_numpy, total=0)
        workspace.train('out-answers', *FLAGS)
    return workspace


def state(place, out_dir):
    return torch.load(place.folder / out_dir / 'state.pt', weights_only=True)


def losses(place, out_dir):
    return [record[name] for record in place.records(out_dir) for name in ('loss', 'val_loss')
            if name in record]


def nats(model, windows, counted):
    """The negative log-likelihood of each target that counts, in float64. windows: (B, T + 1)."""
    x = torch.from_numpy(windows[:, :-1].astype(np.int64))
    y = torch.from_numpy(windows[:, 1:].astype(np.int64))
    with torch.no_grad():
        logits = model(x, y)[0].double()                                # (B, T, V)
    each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction='none')
    return each[torch.from_numpy(counted[:, 1:] == 1).flatten()]


def test_the_logged_losses_are_means_over_the_tokens_that_count(place, monkeypatch):
    """Of training and of evaluation, computed from the files and the weights alone."""
    rate = 1e-12                                # the weights stay as they are
    place.train('out-still', *FLAGS, '--max_iters=2', f'--learning_rate={rate}',
                f'--min_lr={rate}', '--weight_decay=0')
    monkeypatch.setattr(dataloader, 'DATA', place.folder / 'data')
    model = load_model(GPT, 'resume', place.folder / 'out-still').model
    data = TokenDataset('answers', documents='whole')
    data.set_block_size(96)

    def mean(split, starts):
        folder = place.folder / 'data' / 'answers'
        tokens = np.fromfile(folder / f'{split}.bin', '<u2')
        mask = np.fromfile(folder / f'{split}.mask', 'u1')
        places = starts[:, None] + np.arange(97)
        return nats(model, tokens[places], mask[places]).mean().item()

    # two iterations of two micro-batches of two sequences, then two evaluation batches of two
    records = place.records('out-still')
    for iteration in range(2):
        starts = data.starts(1337, 'train', 4 * iteration, 4)
        logged, = [r['loss'] for r in records if r['iter'] == iteration and 'loss' in r]
        assert logged == pytest.approx(mean('train', starts), abs=1e-6)
    logged, = [r['val_loss'] for r in records if r['iter'] == 2 and 'val_loss' in r]
    assert logged == pytest.approx(mean('val', data.starts(0, 'eval val', 0, 4)), abs=1e-6)


@pytest.mark.skipif(not CAN_FORK, reason='starting several ranks in forks takes Linux')
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_two_ranks_have_the_losses_of_one(place, strategy):
    """Though the answers of a micro-batch have different numbers of tokens on each rank."""
    place.train('out-answers-ranks', *FLAGS, f'--strategy={strategy}', '--overwrite=True',
                ranks=2)
    found = losses(place, 'out-answers-ranks')
    assert found == pytest.approx(losses(place, 'out-answers'), abs=1e-6)


def test_a_resumed_run_is_the_same_bit_for_bit(place):
    place.train('out-parts', *FLAGS, '--max_iters=3')
    place.run('train.py', '--init_from=resume', '--out_dir=out-parts', '--max_iters=8',
              '--device=cpu', '--compile=False')
    found = state(place, 'out-parts')
    expected = state(place, 'out-answers')
    assert found['iter_num'] == 8
    for name, weight in expected['model'].items():
        assert torch.equal(found['model'][name], weight), name
    logged = [r['loss'] for r in place.records('out-parts') if 'loss' in r]
    assert logged == [r['loss'] for r in place.records('out-answers') if 'loss' in r]


def test_whole_documents_are_packed_in_a_block(place, monkeypatch):
    """A window starts where a document does, and has the documents after it, with their masks."""
    monkeypatch.setattr(dataloader, 'DATA', place.folder / 'data')
    data = TokenDataset('answers', documents='whole')
    data.set_block_size(96)
    tokenizer = Tokenizer(SPEC)
    end = SPEC.end_of_text

    # the text and the counted text of every training document, as they follow one another
    documents = [conversation(i) for i in range(100) if i % 5 != 4]
    texts = [''.join(text for text, _ in segments) for segments in documents]
    assert texts[0] != texts[-1]
    n_whole = 0
    numbers = set()
    x, y = data.batch(0, 'train', 0, 1000)
    for inputs, targets in zip(x.tolist(), y.tolist()):
        assert inputs[0] == end
        first, *others = [tokenizer.decode(part) for part in split(inputs[1:], end)]
        number = texts.index(first)
        following = (texts[number + 1:] + texts)[:len(others)]      # after the last, the first
        assert others[:-1] == following[:-1]
        assert following[-1].startswith(others[-1])
        n_whole = max(n_whole, len(others))
        numbers.add(number)

        # what counts in the first document: its answer, the marker after it, its end
        counted = [target for target in targets[:len(first) + 1] if target != -1]
        answer = ''.join(text for text, counts in documents[number] if counts)
        assert tokenizer.decode(counted) == answer + '<|endoftext|>'
    assert n_whole >= 2
    assert len(numbers) == len(texts)                   # the first and the last ones too


def split(ids, end):
    """The lists of ids between those that are `end`."""
    parts = [[]]
    for i in ids:
        if i == end:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def test_a_prompt_has_the_tokens_of_the_dataset_before_the_answer(place, monkeypatch):
    """The layout comes from the checkpoint, and the question is the only thing that is given."""
    loaded = load_model(GPT, 'resume', place.folder / 'out-answers')
    assert loaded.chat == LAYOUT
    tokenizer = Tokenizer(loaded.spec)
    tokens = np.fromfile(place.folder / 'data' / 'answers' / 'train.bin', '<u2')
    starts = np.flatnonzero(tokens == SPEC.end_of_text)
    question = conversation(7)[1].text
    ids = sample.Prompter(tokenizer, loaded.chat, '').encode(question)
    found = [start for start in starts if tokens[start:start + len(ids)].tolist() == ids]
    assert len(found) == 1
    after = tokenizer.decode(tokens[found[0] + len(ids):][:100])
    assert after.startswith(conversation(7)[4].text + '<|end|><|endoftext|>')


def test_an_answer_is_sampled_up_to_its_end(place, capsys, monkeypatch):
    """A model that always says `ab<|end|>` is asked something."""
    def stream(self, idx, max_new_tokens, *args, **options):
        for token in Tokenizer(SPEC).encode('ab<|end|><|endoftext|>cd'):
            yield torch.full((len(idx),), token)

    monkeypatch.setattr(GPT, 'stream', stream)
    flags = ['--device=cpu', f'--out_dir={place.folder / "out-answers"}', '--start=bad',
             '--num_samples=2', '--chat=True']
    with script_settings(sample, *flags) as overrides:
        sample.main(overrides)
    assert capsys.readouterr().out == 'bad\nab\n---------------\n' * 2
