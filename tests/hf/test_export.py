import io
import json
import os
import signal
from contextlib import redirect_stdout

import numpy as np
import pytest
import safetensors.torch
import torch
from harness import CHARACTERS, ROOT, script_settings

import export
import train
from engine.errors import RunError, UserError
from engine.hf import save_pretrained
from engine.hf.tokenizer_json import pretrained_spec, train_bpe
from engine.tokenizer import GPT2, Tokenizer, TokenizerSpec, same_tokens

transformers = pytest.importorskip('transformers')


def test_an_exported_run_computes_what_its_checkpoint_does(trained, tmp_path, capsys):
    from model import GPT
    run = trained.folder / 'out-toy'
    target = tmp_path / 'new' / 'exported'
    export.main([str(run), str(target)])
    assert capsys.readouterr().out == f'wrote {target}\n'

    reference = transformers.GPT2LMHeadModel.from_pretrained(target)
    model = GPT.from_checkpoint(run)
    idx = torch.randint(17, (2, 32))
    torch.testing.assert_close(reference(idx).logits, model(idx, idx)[0], rtol=1e-4, atol=1e-5)
    saved = torch.load(run / 'ckpt.pt', weights_only=True)['model']
    assert torch.equal(reference.transformer.wte.weight, saved['transformer.wte.weight'])


def test_the_command_says_what_it_wrote_on_stdout_and_the_rest_on_stderr(trained):
    result = trained.run('export.py', 'out-toy', 'exported')
    assert result.stdout == 'wrote exported\n'
    assert {path.name for path in (trained.folder / 'exported').iterdir()} == {
        'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
        'tokenizer_config.json', 'README.md'}
    assert result.stderr.startswith('note: llama.cpp has no tokenizer of characters')
    assert result.stderr.count('\n') == result.stderr.count('note: ') == 2


def nanogpts_optimizer(model):
    """AdamW with nanoGPT's two groups of parameters."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([dict(params=matrices, weight_decay=0.1),
                              dict(params=others, weight_decay=0.0)])


def test_a_run_for_nanogpt_has_its_optimizer_inside(trained):
    """Loaded as nanoGPT does it, it takes the step that the run takes here."""
    from engine.checkpoint import run_folder
    from engine.training import optim
    from model import GPT
    trained.run('export.py', 'out-toy', 'for-nanogpt', '--to=nanogpt')
    loaded = torch.load(trained.folder / 'for-nanogpt' / 'ckpt.pt', weights_only=True)
    assert set(loaded) == {
        'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'}
    assert set(loaded['model_args']) == {
        'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias'}

    saved, _ = run_folder.load_state(trained.folder / 'out-toy')
    idx = torch.randint(17, (2, 32))
    weights = []
    for here in (True, False):
        model = GPT.from_checkpoint(saved)
        if here:
            optimizer = optim.adamw(model, 1e-3, 0.1, (0.9, 0.95))
            optim.load_state_dict(optimizer, torch.amp.GradScaler('cpu', enabled=False), saved)
        else:
            model.load_state_dict(loaded['model'])
            optimizer = nanogpts_optimizer(model)
            optimizer.load_state_dict(loaded['optimizer'])
        optim.set_lr(optimizer, 1e-3)
        model(idx, idx)[1].backward()
        optimizer.step()
        weights.append(model.state_dict())

    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-6), name


def test_a_failure_leaves_no_folder(trained, tmp_path, monkeypatch):
    def fail(self, folder, **options):
        folder.mkdir()
        (folder / 'model.safetensors').write_bytes(b'half')
        raise Exception('SafetensorError: No space left')       # of a class of its own
    monkeypatch.setattr(transformers.GPT2LMHeadModel, 'save_pretrained', fail)
    with pytest.raises(RunError, match='exported was not written .*No space left'):
        export.main([str(trained.folder / 'out-toy'), str(tmp_path / 'exported')])
    assert not list(tmp_path.iterdir())


def has_gpt2_encoding():
    try:
        Tokenizer(GPT2)
    except RunError:
        return False
    return True


@pytest.fixture(scope='module')
def language_models(trained):
    """Runs on the same walk of characters as 'toy': with a BPE tokenizer of its own, and with
    GPT-2's where tiktoken has it."""
    ids = np.fromfile(trained.folder / 'data' / 'toy' / 'train.bin', '<u2')
    walk = ''.join(CHARACTERS[i] for i in ids)
    (trained.folder / 'walk.txt').write_text(walk, encoding='utf-8')

    tokenizers = ['bpe']
    if has_gpt2_encoding():
        tokenizers.append('gpt2')
    runs = ['out-toy']
    for tokenizer in tokenizers:
        trained.run('data/text/prepare.py', '--input=walk.txt', f'--name={tokenizer}',
                    f'--tokenizer={tokenizer}', '--vocab_size=300')
        trained.run('train.py', *trained.flags(f'out-{tokenizer}', dataset=tokenizer, max_iters=10,
                                               eval_interval=10))
        runs.append(f'out-{tokenizer}')
    for run in runs:
        trained.run('export.py', run, f'{run}-hf')
    return trained, runs


GREEDY = ('--device=cpu', '--temperature=0', '--num_samples=1')


def test_transformers_continues_a_text_as_sample_does(language_models):
    """Greedily, with the tokenizer and the generation settings that lie in the folder."""
    workspace, runs = language_models
    assert len(runs) >= 2
    for run in runs:
        folder = workspace.folder / f'{run}-hf'
        sampled = workspace.run('sample.py', f'--out_dir={run}', *GREEDY, '--start=abc\nd',
                                '--max_new_tokens=16').stdout
        generate = transformers.pipeline('text-generation', model=str(folder))
        expected = generate('abc\nd', max_new_tokens=16, do_sample=False)[0]['generated_text']
        assert sampled == expected + '\n---------------\n' and len(expected) >= 21

        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(generate.model) is type(model)


def test_the_exported_tokenizer_gives_the_ids_of_the_dataset(language_models):
    workspace, runs = language_models
    for run in runs:
        tokenizer = transformers.AutoTokenizer.from_pretrained(workspace.folder / f'{run}-hf')
        dataset = workspace.folder / 'data' / run.removeprefix('out-')
        ids = np.fromfile(dataset / 'train.bin', '<u2')[:200].tolist()
        text = tokenizer.decode(ids)
        assert set(text) <= set(CHARACTERS) and tokenizer(text).input_ids == ids
        assert tokenizer.model_max_length == 32


def test_what_was_exported_comes_back_as_it_was(language_models):
    """Weights to the bit, and the tokenizer, so that training goes on with the same dataset."""
    from engine.checkpoint import gathered
    from engine.hf import weights as hf_weights
    from model import GPT, GPTConfig
    workspace, runs = language_models
    for run in runs:
        folder = str(workspace.folder / f'{run}-hf')
        saved = gathered.read_ckpt(workspace.folder / run)
        arguments, weights = hf_weights.load(folder)
        model = GPT.from_weights(GPTConfig(**arguments), weights).state_dict()
        assert all(torch.equal(value, model[name]) for name, value in saved.model.items())
        spec = TokenizerSpec.from_dict(saved.tokenizer)
        assert same_tokens(pretrained_spec(folder), spec)

    text = workspace.run('sample.py', '--init_from=out-bpe-hf', '--device=cpu', '--num_samples=1',
                         '--start=ab', '--max_new_tokens=5').stdout
    assert text.startswith('ab')


def test_a_resumed_run_needs_the_tokenizer_that_it_began_with(language_models):
    workspace, _ = language_models
    (workspace.folder / 'other.txt').write_text('another text, ' * 500, encoding='utf-8')
    workspace.run('data/text/prepare.py', '--input=other.txt', '--name=other', '--tokenizer=bpe',
                  '--vocab_size=300')
    refused = workspace.run('train.py', '--init_from=resume', '--out_dir=out-bpe',
                            '--dataset=other', '--device=cpu', code=2).stderr
    assert 'other has another vocabulary than the run' in refused and refused.count('\n') == 1


@pytest.mark.parametrize('kind, options', [
    ('NanoChat', dict(norm='rmsnorm', activation='relu2', qk_norm=True, embedding_norm=True,
                      tied=False, softcap=15.0)),
    ('Llama', dict(norm='rmsnorm_gain', activation='swiglu', n_kv_head=1, tied=False)),
    ('Qwen3', dict(norm='rmsnorm_gain', activation='swiglu', n_kv_head=1, qk_norm=True)),
])
def test_other_shapes_continue_as_sample_does(workspace, kind, options):
    from engine.checkpoint import gathered
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32, bias=False,
                          position='rotary', **options))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)                                  # so that the text varies
    spec = train_bpe(['some words to make tokens of, and some more of them. ' * 9], 280)
    run = workspace.folder / f'out-{kind}'
    run.mkdir()
    gathered.write(run / gathered.MODEL, dict(
        model.to_checkpoint(), iter_num=1, best_val_loss=1.0, config={},
        tokenizer=spec.to_dict()))

    workspace.run('export.py', f'out-{kind}', f'{kind}-hf', '--trim_vocab=True')
    generate = transformers.pipeline('text-generation', model=str(workspace.folder / f'{kind}-hf'))
    assert type(generate.model).__name__ == f'{kind}ForCausalLM'
    assert generate.model.config.vocab_size == spec.vocab_size

    sampled = workspace.run('sample.py', f'--out_dir=out-{kind}', *GREEDY, '--start=some words',
                            '--max_new_tokens=20').stdout.removesuffix('\n---------------\n')
    expected = generate('some words', max_new_tokens=20, do_sample=False)[0]['generated_text']
    is_same = sampled == expected and len(set(sampled[10:])) > 2
    # The token ends the text in the pipeline, which does not show it.
    assert is_same or sampled.startswith(expected + '<|endoftext|>')


def trained_model(config, spec, weights=None):
    """What save_pretrained takes: by default, a new model of a GPTConfig."""
    from model import GPT
    if weights is None:
        torch.manual_seed(0)
        weights = GPT(config).state_dict()
    return save_pretrained.TrainedModel(config=config, weights=weights, spec=spec, settings={},
                                        iter_num=1, best_val_loss=1.0, losses=[])


@pytest.mark.parametrize('name', sorted(path.stem for path in (ROOT / 'config').glob('*.py')))
def test_a_model_of_each_config_can_be_exported(tmp_path, name):
    """A toy one with the config's options, in transformers' forward pass and in ours."""
    from model import GPT, GPTConfig
    flags = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--dropout=0.0']
    path = ROOT / 'config' / f'{name}.py'
    flag = '--embedding_norm=True'
    if f'Add {flag} for a model that export.py can write' in path.read_text(encoding='utf-8'):
        flags.append(flag)
    with script_settings(train, path, *flags):
        shape = {name: getattr(train, name) for name in train.MODEL_SETTINGS}
    spec = TokenizerSpec('char', len(CHARACTERS), chars=CHARACTERS)
    trained = trained_model(GPTConfig(16, spec.vocab_size, **shape), spec)
    save_pretrained.write(tmp_path / 'exported', trained)

    model = GPT.from_weights(trained.config, trained.weights)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'exported')
    idx = torch.randint(spec.vocab_size, (2, 16))
    torch.testing.assert_close(reference(idx).logits, model(idx, idx)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('characters', [CHARACTERS, 'ABC'])
@pytest.mark.parametrize('block_size', [8, 64, 512])
def test_the_example_of_the_model_card_runs(tmp_path, monkeypatch, block_size, characters):
    from model import GPTConfig
    spec = TokenizerSpec('char', len(characters), chars=characters)
    config = GPTConfig(block_size, spec.vocab_size, n_layer=1, n_head=1, n_embd=8)
    save_pretrained.write(tmp_path, trained_model(config, spec))
    monkeypatch.chdir(tmp_path)

    # as somebody copies it
    example = (tmp_path / 'README.md').read_text(encoding='utf-8').split('```')[1]
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(example.removeprefix('python'), {})
    text = printed.getvalue()[:-1]                     # without print's line end
    assert len(text) == min(100, block_size)
    assert set(text) <= set(characters)

    # and without a length, where transformers would take 256 tokens
    if block_size == 64:
        generate = transformers.pipeline('text-generation', model='.')
        assert len(generate(characters[0])[0]['generated_text']) == 64


def test_the_model_card_adds_the_special_tokens_that_characters_lack(tmp_path, monkeypatch):
    from model import GPTConfig
    spec = TokenizerSpec('char', 3, chars='abc')
    config = GPTConfig(16, spec.vocab_size, n_layer=1, n_head=1, n_embd=8)
    notes = save_pretrained.write(tmp_path, trained_model(config, spec))
    assert 'README.md in the folder has the lines' in notes[-1]
    monkeypatch.chdir(tmp_path)
    example = (tmp_path / 'README.md').read_text(encoding='utf-8').split('```')[3]
    exec(example.removeprefix('python'), {})

    tokenizer = transformers.AutoTokenizer.from_pretrained('with-special-tokens')
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
            tokenizer.unk_token_id} == {3}
    batch = tokenizer(['abca', 'b'], padding=True, return_tensors='pt').input_ids
    assert sorted(batch[1].tolist()) == [1, 3, 3, 3]
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder)
                     for folder in ('.', 'with-special-tokens'))
    assert torch.equal(before(batch[:1]).logits, after(batch[:1]).logits[..., :3])


def test_own_byte_pairs_have_every_special_token(tmp_path):
    from model import GPTConfig
    spec = train_bpe(['some words to make tokens of. ' * 9], 270)
    config = GPTConfig(16, spec.vocab_size, n_layer=1, n_head=1, n_embd=8)
    notes = save_pretrained.write(tmp_path, trained_model(config, spec))
    assert "llama.cpp's converter refuses tokenizers that it does not know" in notes[1]

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token,
            tokenizer.unk_token} == {'<|endoftext|>'}
    batch = tokenizer(['some words', 'to'], padding=True)
    assert {len(ids) for ids in batch.input_ids} == {len(batch.input_ids[0])}
    assert same_tokens(pretrained_spec(str(tmp_path)), spec)
    assert '```' in (tmp_path / 'README.md').read_text(encoding='utf-8')


def test_others_may_read_what_was_exported(trained, tmp_path):
    before = os.umask(0o022)
    try:
        export.main([str(trained.folder / 'out-toy'), str(tmp_path / 'exported')])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / 'exported').iterdir()} == {0o644}


def test_sigterm_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    def be_stopped(self, folder, **options):
        folder.mkdir()
        (folder / 'model.safetensors').write_bytes(b'half')
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(transformers.GPT2LMHeadModel, 'save_pretrained', be_stopped)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        export.main([str(trained.folder / 'out-toy'), str(tmp_path / 'exported')])
    assert stopped.value.code == 143
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_link_to_an_empty_folder_leads_to_the_export(trained, tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'disk')
    export.main([str(trained.folder / 'out-toy'), str(tmp_path / 'link')])
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'disk' / 'config.json').is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['disk', 'link']


def test_padding_is_never_generated_and_can_be_cut(language_models):
    workspace, runs = language_models
    if 'out-gpt2' not in runs:
        pytest.skip("tiktoken has no copy of GPT-2's encoding")
    result = workspace.run('export.py', 'out-gpt2', 'trimmed', '--trim_vocab=True')
    whole, trimmed = (transformers.AutoModelForCausalLM.from_pretrained(workspace.folder / name)
                      for name in ('out-gpt2-hf', 'trimmed'))
    assert 'padding' not in result.stderr
    assert trimmed.config.vocab_size == 50257
    assert whole.config.vocab_size == 50304
    idx = torch.randint(50257, (2, 32))
    assert torch.equal(whole(idx).logits[..., :50257], trimmed(idx).logits)

    # Now the padding is the likeliest.
    prompt = idx[:1, :31]
    with torch.no_grad():
        last = whole.transformer(prompt).last_hidden_state[0, -1]
        whole.transformer.wte.weight[50257:] = 10 * last
    assert whole(prompt).logits[0, -1].argmax() >= 50257
    assert whole.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1] < 50257


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_weights_are_written_in_the_type_asked_for(trained, tmp_path, dtype):
    with script_settings(export, f'--dtype={dtype}'):
        export.main([str(trained.folder / 'out-toy'), str(tmp_path / 'half')])
    weights = safetensors.torch.load_file(tmp_path / 'half' / 'model.safetensors')
    saved = torch.load(trained.folder / 'out-toy' / 'ckpt.pt', weights_only=True)['model']
    kind = getattr(torch, dtype)
    assert {value.dtype for value in weights.values()} == {kind}
    assert torch.equal(weights['transformer.wte.weight'], saved['transformer.wte.weight'].to(kind))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'half')
    assert model.dtype == kind


def test_large_weights_are_split_into_files(trained, tmp_path, monkeypatch):
    assert save_pretrained.MAX_SHARD_SIZE == '5GB'
    monkeypatch.setattr(save_pretrained, 'MAX_SHARD_SIZE', '50KB')
    export.main([str(trained.folder / 'out-toy'), str(tmp_path / 'split')])
    assert len(list((tmp_path / 'split').glob('model-*.safetensors'))) > 1
    saved = torch.load(trained.folder / 'out-toy' / 'ckpt.pt', weights_only=True)['model']
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'split')
    assert torch.equal(loaded.transformer.wpe.weight, saved['transformer.wpe.weight'])


def test_the_files_have_what_other_readers_look_for(language_models):
    """llama.cpp's converter reads n_ctx of config.json, which transformers no longer writes."""
    workspace, runs = language_models
    for run in runs:
        folder = workspace.folder / f'{run}-hf'
        config, generation = (json.loads((folder / name).read_text(encoding='utf-8'))
                              for name in ('config.json', 'generation_config.json'))
        expected = dict(
            model_type='gpt2',
            architectures=['GPT2LMHeadModel'],
            n_ctx=32,
            n_positions=32,
            n_embd=32,
            n_inner=128,
            n_head=2,
            n_layer=2,
            layer_norm_epsilon=1e-5,
            activation_function='gelu',
            dtype='float32',
            torch_dtype='float32',
            tie_word_embeddings=True,
        )
        assert config.items() >= expected.items()

        end = {'out-toy': None, 'out-bpe': 0, 'out-gpt2': 50256}[run]
        assert config.get('eos_token_id') == end
        assert config.get('bos_token_id') == end
        assert generation.get('eos_token_id') == end
    if 'out-gpt2' in runs:
        assert generation['suppress_tokens'] == list(range(50257, 50304))
        names = {path.name for path in folder.iterdir()}
        assert {'vocab.json', 'merges.txt', 'tokenizer.json'} <= names


def test_the_model_card_says_what_was_trained(language_models):
    workspace, _ = language_models
    card = (workspace.folder / 'out-bpe-hf' / 'README.md').read_text(encoding='utf-8')
    saved = torch.load(workspace.folder / 'out-bpe' / 'ckpt.pt', weights_only=True)
    last = [record for record in workspace.records('out-bpe') if 'val_loss' in record][-1]
    for words in (
            'library_name: transformers',
            '300 tokens (bpe)',
            '10 iterations on the dataset bpe',
            '| n_embd | 32 |',
            f'| iteration 10 | {last["train_loss"]:.4f} | {last["val_loss"]:.4f} |',
            f'| {saved["best_val_loss"]:.4f} |'):
        assert words in card

    count = sum(value.numel() for name, value in saved['model'].items() if name != 'lm_head.weight')
    assert f'\n{count:,} parameters' in card

    # transformers' GPT-2 has biases where the run has none
    model = transformers.AutoModelForCausalLM.from_pretrained(workspace.folder / 'out-bpe-hf')
    assert f'The files have {model.num_parameters() - count:,} biases besides' in card


def test_a_model_card_holds_no_markup_of_a_setting():
    run = save_pretrained.TrainedModel(
        config=None, weights={},
        spec=TokenizerSpec('char', 3, chars='abc'),
        settings=dict(out_dir='a | b\n# c <script>', dataset='[x](http://y)'),
        iter_num=1, best_val_loss=1.0, losses=[],
    )
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1))
    card = save_pretrained.model_card(model, run, 'float32')
    assert '\n# a \\| b \\# c \\<script\\>\n' in card
    assert 'dataset \\[x\\](http://y).' in card


@pytest.mark.parametrize('text', ['', '[]', '7', '{', '[' * 100_000])
def test_a_damaged_tokenizer_config_is_refused(text):
    with pytest.raises(UserError, match='is not a JSON object'):
        save_pretrained.read_tokenizer_config(text)

    text = '{"eos_token": "a", "auto_map": {"AutoTokenizer": "b"}}'
    assert save_pretrained.read_tokenizer_config(text) == {'eos_token': 'a'}


@pytest.mark.parametrize('flags, words', [
    (['--dtype=int8'], "dtype='int8' is unknown; try 'float32', 'bfloat16', 'float16'"),
    (['--to=gguf'], "to='gguf' is unknown"),
    (['--to=nanogpt', '--dtype=float16'], 'are for --to=hf'),
    (['--to=nanogpt', '--trim_vocab=True'], 'are for --to=hf'),
])
def test_settings_that_do_not_fit_are_refused(tmp_path, flags, words):
    with script_settings(export, *flags), pytest.raises(UserError, match=words):
        export.main(['out', str(tmp_path / 'new')])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('folders, words', [
    ([], 'name a run and the folder to write'),
    (['out'], 'name a run and the folder to write'),
    (['out', 'taken'], 'taken exists already; name a new folder'),
    (['out', 'file'], 'file exists already'),
    (['out', 'nowhere'], 'nowhere is a link to gone, which does not exist; remove the link'),
    (['out', 'new'], 'ckpt.pt does not exist; train first'),
])
def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch, folders, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'weights').write_text('precious')
    (tmp_path / 'file').write_text('precious')
    (tmp_path / 'nowhere').symlink_to('gone')
    with pytest.raises(UserError, match=words):
        export.main(folders)
    assert sorted(p.name for p in tmp_path.rglob('*')) == [
        'file', 'nowhere', 'taken', 'weights']
