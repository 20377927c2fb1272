"""Adapters of low rank, and frozen layers."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from harness import CHARACTERS, SETTINGS, read_records, script_settings, write_toy_dataset

import export
import train
from engine.checkpoint import run_folder
from engine.checkpoint.load_model import grow_embedding
from engine.distributed import Environment
from engine.errors import UserError
from engine.training import chunked_loss, lora
from engine.training.chunked_loss import chunked_cross_entropy
from engine.training.freeze import freeze_layers
from model import GPT, GPTConfig

SHAPE = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
# a toy run with adapters, whose shape the base decides
FLAGS = [f'--{name}={value}' for name, value in SETTINGS.items()
         if name not in ('n_layer', 'n_head', 'n_embd')]
ADAPTERS = ('--lora_rank=4', '--lora_dropout=0.1', '--learning_rate=0.01')


def tiny_gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPE, **changes}))


def environment(dtype='float32'):
    return Environment(torch.device('cpu'), dtype, False, 0, 0, 1, '')


def adapt(model, dtype='float32', **changes):
    """Put adapters into `model`, as train.py does. Returns its base."""
    settings = dict(lora_rank=4, lora_alpha=8.0, lora_targets='c_attn,c_proj,c_fc',
                    lora_dropout=0.0, seed=1, init_from='somewhere', out_dir='out')
    return lora.replace_linears(model, {**settings, **changes}, None, environment(dtype))


def with_trained_adapters(model, **options):
    """`model` with adapters that have left their beginning, where B is zero."""
    adapt(model, **options)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith('lora_b'):
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def plain_gpt(config, weights):
    model = GPT(config)
    model.load_state_dict(weights)
    return model


# The formula

@pytest.mark.parametrize('rank', [3, 32, 200])
def test_the_first_step_is_that_of_full_finetuning_projected_on_the_rows_of_a(rank):
    """One step of SGD moves W by -lr (alpha / r)^2 G A^T A, where G is its gradient in full
    finetuning. With r = in = 32, A^T A = 1, so it has the direction of full finetuning's step."""
    full = tiny_gpt()
    adapted = copy.deepcopy(full)
    adapt(adapted, lora_rank=rank, lora_alpha=2.0 * rank, lora_targets='c_attn')
    before = full.state_dict()
    idx = torch.randint(50, (2, 16))
    targets = torch.randint(50, (2, 16))

    full(idx, targets)[1].backward()
    adapted(idx, targets)[1].backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()

    after = lora.merged_weights(adapted)
    for i in range(2):
        name = f'transformer.h.{i}.attn.c_attn'
        a = adapted.get_submodule(name).lora_a.detach()
        gradient = full.get_submodule(name).weight.grad
        expected = -0.1 * 2.0 ** 2 * gradient @ a.T @ a
        if rank >= 32:
            torch.testing.assert_close(a.T @ a, torch.eye(32), rtol=0, atol=1e-5)
            torch.testing.assert_close(expected, -0.4 * gradient, rtol=1e-4, atol=1e-6)
        moved = after.pop(f'{name}.weight') - before[f'{name}.weight']
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize('changes', [
    dict(),
    dict(bias=False, activation='swiglu', position='rotary', n_kv_head=1, tied=False),
])
def test_the_merged_model_computes_what_the_adapted_one_does(changes):
    base = tiny_gpt(**changes)
    idx = torch.randint(50, (2, 16))
    of_the_base = base(idx, idx)[0]
    model = with_trained_adapters(copy.deepcopy(base), lora_targets='c_attn, mlp.c_proj')

    found = model(idx, idx)[0]
    merged = plain_gpt(base.config, lora.merged_weights(model))
    torch.testing.assert_close(merged(idx, idx)[0], found, rtol=0, atol=1e-5)
    assert (found - of_the_base).abs().max() > 0.1
    assert set(lora.adapters(model)) == {
        f'transformer.h.{i}.{layer}.{matrix}' for i in range(2)
        for layer in ('attn.c_attn', 'mlp.c_proj') for matrix in ('lora_a', 'lora_b')}


def test_a_base_in_bfloat16_multiplies_as_autocast_does_in_float32():
    """Its matrices take half the memory, and its products are the same to the bit."""
    low = with_trained_adapters(tiny_gpt(), dtype='bfloat16')
    high = with_trained_adapters(tiny_gpt())
    idx = torch.randint(50, (2, 16))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(low(idx, idx)[0], high(idx, idx)[0])
    assert low.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert {p.dtype for p in low.parameters() if p.requires_grad} == {torch.float32}

    # without autocast, as samples are drawn; and as saved
    merged = plain_gpt(low.config, lora.merged_weights(low))
    torch.testing.assert_close(merged(idx, idx)[0], low(idx, idx)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('keep_logits', [True, False])
def test_the_rows_of_new_tokens_learn_as_in_full_finetuning(tied, keep_logits, monkeypatch):
    """Their gradients are the same, with whole logits and with those of a few positions."""
    monkeypatch.setattr(chunked_loss, 'MIN_LOGITS', 1)
    monkeypatch.setitem(chunked_loss.CHUNK_LOGITS, 'cpu', 200)
    full = tiny_gpt(tied=tied)
    grow_embedding(full, 48, 52)                        # 50 rows, of which two are padding
    adapted = copy.deepcopy(full)
    base = adapt(adapted)
    idx = torch.randint(52, (2, 16))
    for model in (full, adapted):
        model.keep_logits = keep_logits
        model(idx, idx)[1].backward()

    tables = {'transformer.wte': (full.transformer.wte, adapted.transformer.wte)}
    if not tied:
        tables['lm_head.rows'] = (full.lm_head, adapted.lm_head.rows)
    for name, (whole, grown) in tables.items():
        torch.testing.assert_close(grown.lora_rows.grad, whole.weight.grad[48:52])
        assert f'{name}.lora_rows' in lora.adapters(adapted)

    # they are merged too, and are no part of the fingerprint
    merged = plain_gpt(full.config, lora.merged_weights(adapted))
    torch.testing.assert_close(merged(idx)[0], full(idx)[0], rtol=0, atol=1e-5)
    again = copy.deepcopy(full)
    again.transformer.wte.weight.data[48:52] += 1
    assert adapt(again)['fingerprint'] == base['fingerprint']


def test_a_frozen_head_takes_no_gradient_from_the_chunked_loss():
    x = torch.randn(2, 8, 4)
    targets = torch.randint(50, (2, 8))
    gradients = []
    for loss in (
        lambda x, weight: chunked_cross_entropy(x, weight, targets, 0.0),
        lambda x, weight: F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten()),
    ):
        own = x.clone().requires_grad_()
        weight = torch.linspace(-1, 1, 200).view(50, 4)
        loss(own, weight).backward()
        gradients.append(own.grad)
        assert weight.grad is None
    torch.testing.assert_close(*gradients)


def test_the_arithmetic_of_a_frozen_weight_is_two_thirds():
    model = tiny_gpt()
    attention = 12 * 2 * 32 * 16
    n_parameters = model.get_num_params(non_embedding=False)
    n_multiplied = n_parameters - 16 * 32               # but for the learned positions
    assert model.flops_per_token() == 6 * n_multiplied + attention
    model.requires_grad_(False)
    assert model.flops_per_token() == 4 * n_multiplied + attention


# Runs

@pytest.fixture(scope='module')
def base(trained, tmp_path_factory):
    """A folder of Hugging Face weights that know the toy dataset's tokens."""
    pytest.importorskip('transformers')
    folder = tmp_path_factory.mktemp('weights') / 'base'
    with script_settings(export):
        export.main([str(trained.folder / 'out-toy'), str(folder)])
    return folder


def run(base, out_dir, *flags):
    """Run train.py with adapters in this process."""
    with script_settings(train, *FLAGS, f'--init_from={base}', f'--out_dir={out_dir}', *ADAPTERS,
                         *flags) as overrides:
        train.main(overrides)


def resume(out_dir, *flags):
    with script_settings(train, '--init_from=resume', f'--out_dir={out_dir}', '--device=cpu',
                         '--compile=False', *flags) as overrides:
        train.main(overrides)


@pytest.fixture(scope='module')
def toy_data(trained):
    """Lets this process find the workspace's datasets."""
    from engine.dataloader import batches
    patch = pytest.MonkeyPatch()
    patch.setattr(batches, 'DATA', trained.folder / 'data')
    yield
    patch.undo()


@pytest.fixture(scope='module')
def adapted(base, toy_data, tmp_path_factory):
    """The folder of a finished run with adapters."""
    out_dir = tmp_path_factory.mktemp('adapted') / 'out'
    run(base, out_dir, '--keep_interval=20')
    return out_dir


def test_a_run_with_adapters_learns_and_resumes_bit_for_bit(base, adapted, tmp_path):
    """With dropout of the model and of the adapters."""
    out_dir = tmp_path / 'out'
    run(base, out_dir, '--max_iters=7')
    resume(out_dir, '--max_iters=20')

    assert read_records(out_dir)[-1] == read_records(adapted)[-1]
    states = [torch.load(folder / 'state.pt', weights_only=True) for folder in (adapted, out_dir)]
    assert states[0]['base'] == states[1]['base']
    torch.testing.assert_close(states[0]['adapters'], states[1]['adapters'], rtol=0, atol=0)
    losses = [r['val_loss'] for r in read_records(adapted) if 'val_loss' in r]
    assert losses[-1] < losses[0]


def test_the_model_for_people_is_merged_and_the_state_is_small(base, adapted):
    saved = run_folder.newest_checkpoint(adapted)
    model = GPT.from_checkpoint(adapted)
    again = GPT.from_pretrained(str(base))
    settings = dict(saved.config, init_from='resume')
    lora.replace_linears(again, settings, saved, environment())
    again.eval()                                        # the adapters have dropout

    idx = torch.randint(17, (2, 32))
    torch.testing.assert_close(model(idx, idx)[0], again(idx, idx)[0], rtol=0, atol=1e-5)
    state = torch.load(adapted / 'state.pt', weights_only=True)
    assert state['model'] == {}
    names = set(GPT(model.config).state_dict())
    assert set(saved.model) == names

    # the model that stays is merged as well
    kept = run_folder.newest_checkpoint(adapted / 'ckpt_000020.pt')
    for name, weight in kept.model.items():
        assert torch.equal(weight, saved.model[name]), name


def test_new_tokens_and_stretched_positions_resume_bit_for_bit(trained, toy_data, tmp_path):
    """The base is a run, which knows neither one of the characters nor half of the positions."""
    more = tmp_path / 'more'
    write_toy_dataset(more, CHARACTERS + 'z')
    first = trained.folder / 'out-toy'
    flags = (f'--dataset={more}', '--block_size=64', '--eval_interval=2', '--weight_decay=0')
    run(first, tmp_path / 'straight', *flags, '--max_iters=4')
    run(first, tmp_path / 'parts', *flags, '--max_iters=2')
    resume(tmp_path / 'parts', '--max_iters=4')

    states = [torch.load(tmp_path / name / 'state.pt', weights_only=True)
              for name in ('straight', 'parts')]
    torch.testing.assert_close(states[0]['adapters'], states[1]['adapters'], rtol=0, atol=0)
    torch.testing.assert_close(states[0]['optimizer'], states[1]['optimizer'], rtol=0, atol=0)

    model = GPT.from_checkpoint(tmp_path / 'parts')
    begun = run_folder.newest_checkpoint(first).model['transformer.wte.weight']
    rows = model.transformer.wte.weight
    assert model.config.block_size == 64
    assert torch.equal(rows[:len(CHARACTERS)], begun[:len(CHARACTERS)])
    assert not torch.allclose(rows[len(CHARACTERS)], begun[:len(CHARACTERS)].mean(dim=0))


@pytest.mark.skipif(sys.platform == 'win32',
                    reason='torchrun on Windows needs a PyTorch built with libuv')
def test_two_ranks_train_adapters_as_one(trained, base, adapted):
    flags = [*FLAGS, f'--init_from={base}', '--out_dir=out-adapted', *ADAPTERS]
    trained.run('train.py', *flags, ranks=2)
    records = zip(trained.records('out-adapted'), read_records(adapted), strict=True)
    for two, one in records:
        assert two == {name: pytest.approx(value, rel=1e-4) for name, value in one.items()}


# Mistakes

@pytest.mark.parametrize('flags, words', [
    (['--init_from=scratch'], 'has none; try --init_from=gpt2'),
    (['--lora_targets=c_atn'], "lora_targets has 'c_atn', .*try --lora_targets=c_attn,c_fc,c_proj"),
    (['--freeze=wte'], "freeze=wte has nothing to freeze; try --freeze=''"),
    (['--optimizer=muon'], 'try --optimizer=adamw'),
    (['--checkpoint=sharded'], 'try --checkpoint=gathered'),
    (['--lora_rank=-1'], 'lora_rank=-1 should be at least 0'),
    (['--lora_alpha=0'], 'lora_alpha=0.0 should be above 0'),
])
def test_settings_that_adapters_cannot_have_are_refused(base, toy_data, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run(base, tmp_path / 'out', *flags)


def test_a_sharded_base_is_refused():
    from engine.training.settings_checks import check_ranks
    with script_settings(train, '--lora_rank=4', '--strategy=fsdp'):
        check_ranks(vars(train), environment())                 # one rank has all of it
        two_ranks = Environment(torch.device('cpu'), 'float32', False, 0, 0, 2, '')
        with pytest.raises(UserError, match='lora_rank=4 keeps the base whole .*--strategy=ddp'):
            check_ranks(vars(train), two_ranks)


@pytest.mark.parametrize('flag, words', [
    ('--lora_rank=0', 'has adapters, which lora_rank=0 leaves out'),
    ('--lora_rank=5', 'has adapters of another rank'),
    ('--lora_targets=c_fc', 'or for other Linears'),
])
def test_a_run_goes_on_with_its_own_adapters_only(adapted, flag, words):
    with pytest.raises(UserError, match=words):
        resume(adapted, flag)


def test_adapters_do_not_go_on_over_other_weights(base, adapted, tmp_path):
    """The base of the run, loaded from where it was, has other weights by now."""
    saved = run_folder.load_state(adapted)[0]
    model = GPT.from_pretrained(str(base))
    model.transformer.h[1].mlp.c_fc.bias.data[3] += 1e-3
    with pytest.raises(UserError, match='has other weights than those that the adapters of'):
        lora.replace_linears(model, saved.config, saved, environment())


def test_a_whole_run_cannot_go_on_with_adapters(trained, toy_data):
    words = 'has no adapters, .*by --init_from=.*out-toy and another --out_dir'
    with pytest.raises(UserError, match=words):
        resume(trained.folder / 'out-toy', '--lora_rank=4')


def test_a_state_without_a_merged_model_says_what_writes_one(adapted, tmp_path):
    (tmp_path / 'state.pt').write_bytes((adapted / 'state.pt').read_bytes())
    with pytest.raises(UserError, match='until an evaluation writes ckpt.pt, the merged model'):
        run_folder.newest_checkpoint(tmp_path)


@pytest.mark.parametrize('base_of_file', [None, {}, {'source': 'gpt2'}, {'source': 1}, 'gpt2'])
def test_a_hostile_base_is_refused(adapted, tmp_path, base_of_file):
    state = torch.load(adapted / 'state.pt', weights_only=True)
    torch.save(dict(state, base=base_of_file), tmp_path / 'state.pt')
    with pytest.raises(UserError, match='base'):
        run_folder.load_state(tmp_path)


# Frozen layers

def test_frozen_layers_stay_and_the_others_learn(toy, tmp_path):
    with script_settings(train, *[f'--{name}={value}' for name, value in SETTINGS.items()],
                         f'--out_dir={tmp_path / "out"}', '--freeze=wte, wpe,h.0-0',
                         '--max_iters=3') as overrides:
        train.main(overrides)
    saved = run_folder.newest_checkpoint(tmp_path / 'out').model
    torch.manual_seed(SETTINGS.get('seed', 1337))
    shape = ('block_size', 'n_layer', 'n_head', 'n_embd')
    begun = GPT(GPTConfig(vocab_size=17, bias=False, **{name: SETTINGS[name] for name in shape}))
    for name, weight in begun.state_dict().items():
        is_frozen = not name.startswith(('transformer.h.1.', 'transformer.ln_f'))
        assert torch.equal(saved[name], weight) == is_frozen, name


@pytest.mark.parametrize('names, frozen', [
    ('', set()),
    ('h.0-1.attn', {'transformer.h.0.attn', 'transformer.h.1.attn'}),
    ('lm_head', {'transformer.wte'}),                           # they are tied
    ('h.1,ln_f', {'transformer.h.1', 'transformer.ln_f'}),
])
def test_names_freeze_what_they_say(names, frozen):
    model = tiny_gpt()
    freeze_layers(model, names, environment())
    for name, parameter in model.named_parameters():
        expected = any(name.startswith(f'{layer}.') for layer in frozen)
        assert parameter.requires_grad != expected, name


def test_frozen_rows_of_new_tokens_are_told_of(caplog):
    model = tiny_gpt()
    grow_embedding(model, 50, 53)
    with caplog.at_level('INFO', 'plaingpt'):
        freeze_layers(model, 'h.0', environment())
        assert not caplog.messages
        freeze_layers(model, 'wte', environment())
    assert 'freeze=wte leaves the rows of 3 new tokens as they begin' in caplog.text


@pytest.mark.parametrize('names, words', [
    ('wti', r'freeze has wti, .*there are wte, wpe, ln_f, lm_head, and h.0 to h.1, as in'),
    ('h.0-9', 'freeze has h.2, and no layer'),
    ('h.1-0', 'try h.0-1'),
    ('wte,wpe,h,ln_f', 'leaves nothing to train'),
])
def test_a_name_that_freezes_nothing_is_refused(names, words):
    with pytest.raises(UserError, match=words):
        freeze_layers(tiny_gpt(), names, environment())
