"""data/text/prepare.py with tokenizers of one's own and of others."""

import json
import shutil

import numpy as np
import pytest
from prepare_harness import load, write_jsonl

from engine.errors import UserError
from engine.hf.tokenizer_json import train_bpe
from engine.prepare import encode, text_files
from engine.tokenizer import Tokenizer, read_meta

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')

DOCUMENTS = ['The first document, which is the longest one of all. ' * 30,
             'A second\n\n one: naïve, 漢字 🙂! <|endoftext|> ' * 20, '', 'and the end, ' * 40]
TEXT = ''.join(DOCUMENTS)


@pytest.fixture
def folder(workspace):
    """The folder of the project; its data/mine is removed afterwards."""
    texts = workspace.folder / 'documents'
    texts.mkdir(exist_ok=True)
    for i, text in enumerate(DOCUMENTS):
        (texts / f'{i}.txt').write_text(text, encoding='utf-8', newline='')
    yield workspace.folder
    shutil.rmtree(workspace.folder / 'data' / 'mine', ignore_errors=True)


def prepare(workspace, *flags, code=0, name='mine'):
    return workspace.run('data/text/prepare.py', '--input=documents', f'--name={name}',
                         '--val_fraction=0.2', '--separator=', '--special_tokens=False', *flags,
                         code=code)


def tokens(folder, split, name='mine'):
    return np.fromfile(folder / 'data' / name / f'{split}.bin', '<u2').tolist()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def split_documents():
    """[(split, text)]: the last fifth of each text is val."""
    parts = []
    for text in DOCUMENTS:
        cut = int(len(text) * 0.8)
        parts += [('train', text[:cut]), ('val', text[cut:])]
    return [(split, text) for split, text in parts if text]


@pytest.mark.parametrize('cores', [1, 2])
def test_bpe_is_trained_on_the_train_split_and_ends_each_document(workspace, folder, monkeypatch,
                                                                  cores):
    monkeypatch.setattr(text_files, 'BLOCK', 100)
    result = prepare(workspace, '--tokenizer=bpe', '--vocab_size=320', f'--num_proc={cores}')
    spec = read_meta(folder / 'data' / 'mine')
    assert 'vocabulary 320 (bpe)' in result.stdout
    assert spec.vocab_size == 320 and spec.tokenizer_name == 'bpe'

    # the tokenizer is that of the train split
    parts = split_documents()
    train_texts = [text for split, text in parts if split == 'train']
    assert spec.tokenizer_sha256 == train_bpe(train_texts, 320).tokenizer_sha256

    # the ids are the reference's
    reference = tokenizers.Tokenizer.from_str(spec.tokenizer_json)
    reference.encode_special_tokens = True
    for split in ('train', 'val'):
        expected = []
        for part, text in parts:
            if part == split:
                expected += [*reference.encode(text).ids, spec.end_of_text]
        assert tokens(folder, split) == expected

    def without_ends(text):
        return text.replace('<|endoftext|>', '')

    decoded = Tokenizer(spec).decode(tokens(folder, 'train'))
    assert without_ends(decoded) == without_ends(''.join(train_texts))

    before = contents(folder / 'data' / 'mine')
    prepare(workspace, '--tokenizer=bpe', '--vocab_size=320')
    assert contents(folder / 'data' / 'mine') == before         # the same command, the same bytes


def save_tokenizer(path, eos='</s>', size=None):
    """A tokenizer that puts <s> before a text and whose pattern is not GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=['<unk>', '<s>', '</s>'], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    if size:
        tokenizer.add_tokens([f'<{i}>' for i in range(size - tokenizer.get_vocab_size())])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)])

    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / 'tokenizer.json'))
    config = dict(tokenizer_class='PreTrainedTokenizerFast', eos_token=eos)
    (path / 'tokenizer_config.json').write_text(json.dumps(config))


def test_the_tokenizer_of_a_folder_encodes_whole_documents(workspace, folder):
    save_tokenizer(folder / 'foreign')
    prepare(workspace, '--tokenizer=foreign')
    reference = transformers.AutoTokenizer.from_pretrained(folder / 'foreign')
    for split in ('train', 'val'):
        expected = []
        for part, text in split_documents():
            if part == split:
                expected += [*reference(text).input_ids, 2]
        assert tokens(folder, split) == expected
    assert read_meta(folder / 'data' / 'mine').tokenizer_name == 'foreign'


@pytest.mark.parametrize('dataset', ['openwebtext', 'fineweb_edu'])
def test_datasets_of_documents_take_a_tokenizer(data, tmp_path, monkeypatch, dataset):
    """The reference reads each document whole: cut as GPT-2's tokens may be, these would differ."""
    monkeypatch.setattr(encode, 'PIECE', 20)
    save_tokenizer(tmp_path / 'foreign')
    texts = [f'{DOCUMENTS[i % 4]} {i}' for i in range(12)]
    path = write_jsonl(tmp_path / 'a.jsonl', texts)
    options = dict(shard_tokens=500) if dataset == 'fineweb_edu' else {}
    load(data, dataset, monkeypatch, input=str(path), num_proc=2,
         tokenizer=str(tmp_path / 'foreign'), **options).main()

    reference = tokenizers.Tokenizer.from_file(str(tmp_path / 'foreign' / 'tokenizer.json'))
    documents = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    paths = sorted((data / dataset).glob('*.bin'))
    found = {path.name: np.fromfile(path, '<u2').tolist() for path in paths}
    if dataset == 'fineweb_edu':
        assert len(found) > 2
        ids = found.pop('val_000000.bin') + sum(found.values(), [])
        assert ids == sum(([2, *document] for document in documents), [])
    else:
        val = [i for i in range(12) if found['val.bin'] == [*documents[i], 2]]
        assert len(val) == 1
        del documents[val[0]]
        assert found['train.bin'] == sum(([*document, 2] for document in documents), [])
    assert read_meta(data / dataset).tokenizer_name == 'foreign'


@pytest.mark.parametrize('dataset', ['openwebtext', 'fineweb_edu'])
def test_a_tokenizer_without_an_end_of_text_is_refused_for_documents(data, tmp_path, monkeypatch,
                                                                     dataset):
    save_tokenizer(tmp_path / 'foreign', eos=None)
    path = write_jsonl(tmp_path / 'a.jsonl', DOCUMENTS)
    script = load(data, dataset, monkeypatch, input=str(path), tokenizer=str(tmp_path / 'foreign'))
    with pytest.raises(UserError, match='has no token that ends a document'):
        script.main()

    script.tokenizer = 'gpt3'
    with pytest.raises(UserError, match="'gpt3' is unknown; try --tokenizer=gpt2, a folder"):
        script.main()


def test_another_dataset_takes_the_tokenizer_of_a_first(workspace, folder):
    prepare(workspace, '--tokenizer=bpe', '--vocab_size=300')
    (folder / 'more.txt').write_text('Other words, and the end. ' * 50, encoding='utf-8')
    workspace.run('data/text/prepare.py', '--input=more.txt', '--name=more',
                  '--tokenizer=data/mine')

    spec = read_meta(folder / 'data' / 'more')
    assert spec == read_meta(folder / 'data' / 'mine')
    text = Tokenizer(spec).decode(tokens(folder, 'val', 'more'))
    assert text.endswith('Other words, and the end. <|endoftext|>')


@pytest.mark.parametrize('source', ['data/toy', 'out-toy', 'out-toy/ckpt.pt'])
def test_new_text_goes_on_with_a_vocabulary_of_characters(trained, folder, source):
    """Each command is the one that the message before it names."""
    (folder / 'more.txt').write_text('abc\nmünze ' * 200, encoding='utf-8')
    flags = ['data/text/prepare.py', '--input=more.txt', '--name=mine', f'--tokenizer={source}']
    refused = trained.run(*flags, code=2).stderr
    assert f"{source} lacks 3 characters of the text: ' ' 'z' 'ü'; --add_tokens=auto" in refused

    trained.run(*flags, '--add_tokens=auto')
    spec = read_meta(folder / 'data' / 'mine')
    assert spec.chars == read_meta(folder / 'data' / 'toy').chars + ' zü'

    # a resume has a vocabulary of its own, and names what takes a larger one
    changed = ['--out_dir=out-toy', '--init_from=resume', '--dataset=mine', '--max_iters=30']
    refused = trained.run('train.py', *changed, code=2).stderr
    assert 'begin another --out_dir with --init_from=out-toy' in refused
    shown = trained.train('out-more', '--init_from=out-toy', '--dataset=mine',
                          '--overwrite=True').stdout
    assert "new tokens ' ' 'z' 'ü'" in shown
    assert '20 rows' in shown
    trained.run('sample.py', '--init_from=out-more', '--device=cpu', '--start=münze',
                '--num_samples=1', '--max_new_tokens=5')


def test_special_tokens_are_the_same_in_data_and_prompts(workspace, folder):
    text = '<|user|>how are you<|bot|>fine <|endoftext|>' * 40
    (folder / 'marked.txt').write_text(text, encoding='utf-8')
    flags = ['data/text/prepare.py', '--input=marked.txt', '--name=mine', '--tokenizer=bpe',
             '--vocab_size=300', '--separator=', '--add_tokens=<|user|>, <|bot|>']
    for meaning, is_ordinary in (('True', False), ('False', True)):
        shown = workspace.run(*flags, f'--special_tokens={meaning}').stdout
        assert '<|user|> 40 times, <|bot|> 40 times, <|endoftext|> 40 times' in shown

        tokenizer = Tokenizer(read_meta(folder / 'data' / 'mine'))
        reference = tokenizers.Tokenizer.from_str(tokenizer.spec.tokenizer_json)
        reference.encode_special_tokens = is_ordinary
        assert tokenizer.encode(text) == reference.encode(text).ids
        train = tokens(folder, 'train')
        assert train[:50] == reference.encode(text).ids[:50]
        assert (reference.token_to_id('<|user|>') in train) is not is_ordinary


def test_a_failure_leaves_the_tokenizer_of_the_earlier_dataset(workspace, folder):
    prepare(workspace, '--tokenizer=bpe', '--vocab_size=300')
    before = contents(folder / 'data' / 'mine')

    (folder / 'documents' / '9.txt').write_bytes(b'text\xfftext')
    try:
        refused = prepare(workspace, '--tokenizer=bpe', '--vocab_size=310', code=2)
    finally:
        (folder / 'documents' / '9.txt').unlink()
    assert 'is not UTF-8' in refused.stderr and contents(folder / 'data' / 'mine') == before


@pytest.mark.parametrize('flags, words', [
    (['--tokenizer=bpe', '--vocab_size=256'], 'vocab_size=256 should be at least 257'),
    (['--tokenizer=bpe', '--vocab_size=20000000'], 'vocab_size=20000000 should be'),
    (['--tokenizer=data/toy'], "data/toy lacks "),
    (['--add_tokens=auto'], 'add_tokens=auto adds characters to a vocabulary of characters'),
    (['--tokenizer=words'], "tokenizer='words' is unknown"),
    (['--tokenizer=documents'], 'documents holds no tokenizer')])
def test_settings_that_name_no_tokenizer_are_refused(workspace, folder, flags, words):
    refused = prepare(workspace, *flags, code=2).stderr
    assert words in refused and refused.count('\n') == 1
    assert not (folder / 'data' / 'mine').exists()


@pytest.mark.parametrize('flag, words', [
    ('--add_tokens=<|endoftext|>', "'<|endoftext|>' is a token of gpt2 already"),
    ('--add_tokens=<|a|>,,<|b|>', "the token '' begins or ends with white space"),
    ('--add_tokens=<|a|>,<|a|>', "'<|a|>' is named twice"),
])
def test_tokens_that_cannot_be_added_are_refused(workspace, folder, gpt2, flag, words):
    refused = prepare(workspace, flag, code=2).stderr
    assert words in refused and refused.count('\n') == 1
    assert not (folder / 'data' / 'mine').exists()


@pytest.mark.slow
def test_a_vocabulary_over_65536_takes_four_bytes_per_token(workspace, folder, monkeypatch):
    save_tokenizer(folder / 'large', size=70_000)
    text = '<60000> and <66000>'
    (folder / 'documents' / '9.txt').write_text(text, encoding='utf-8')
    prepare(workspace, '--tokenizer=large')
    (folder / 'documents' / '9.txt').unlink()

    # a file that is short beside the others is one document, here of train
    ids = np.fromfile(folder / 'data' / 'mine' / 'train.bin', '<u4')
    spec = read_meta(folder / 'data' / 'mine')
    assert spec.vocab_size == 70_000 and ids.max() > 65_535
    expected = Tokenizer(spec).encode_to_numpy(text, as_document=True)
    assert ids[-5:].tolist() == expected[-5:].tolist()


def test_a_text_that_is_too_short_for_the_vocabulary_says_so(workspace, folder):
    result = prepare(workspace, '--tokenizer=bpe', '--vocab_size=60000')
    assert 'note: the text has pairs for ' in result.stdout
    with pytest.raises(UserError, match='at least 257'):
        train_bpe(['a'], 256)
