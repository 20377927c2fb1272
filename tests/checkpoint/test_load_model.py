"""Models to sample and to train further, and rows for new tokens."""

import pytest
import torch

from engine.checkpoint.load_model import grow_embedding, load_model, load_to_train
from engine.errors import UserError
from engine.tokenizer import GPT2, add_characters, char_spec, read_meta
from model import GPT, GPTConfig


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('n_trained', [11, 9])
def test_new_rows_are_the_mean_and_change_no_other_logit(tied, n_trained):
    """Of 11 rows, all or 9 were trained, and 13 tokens are wanted."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 11, 1, 1, 4, tied=tied))
    idx = torch.tensor([[1, 5, 2]])
    before = model(idx)[0].detach()
    grow_embedding(model, n_trained, 13)

    after = model(idx)[0].detach()
    assert after.shape[-1] == model.config.vocab_size == 13
    torch.testing.assert_close(after[..., :n_trained], before[..., :n_trained])
    mean = before[..., :n_trained].mean(-1)
    for token in range(n_trained, 13):
        torch.testing.assert_close(after[..., token], mean)

    # what it is saved as is a model of its own, and every row learns
    again = GPT.from_weights(model.config, model.state_dict())
    assert torch.equal(again(idx)[0], model(idx)[0])
    model(torch.tensor([[12]]), torch.tensor([[12]]))[1].backward()
    assert model.transformer.wte.weight.grad[12].abs().sum() > 0


def test_padding_stays_where_new_tokens_need_fewer_rows():
    model = GPT(GPTConfig(8, 64, 1, 1, 4))
    padding = model.transformer.wte.weight[60].clone()
    grow_embedding(model, 50, 52)
    assert model.config.vocab_size == 64
    assert torch.equal(model.transformer.wte.weight[60], padding)
    assert torch.equal(model.transformer.wte.weight[51], model.transformer.wte.weight[:50].mean(0))


@pytest.mark.parametrize('name', ['.', 'ckpt.pt'])
def test_a_run_gives_its_weights_to_another(trained, name):
    out_dir = trained.folder / 'out-toy'
    spec = read_meta(trained.folder / 'data' / 'toy')
    saved = torch.load(out_dir / 'ckpt.pt', weights_only=True)
    model = load_to_train(GPT, str(out_dir / name), 'toy', spec, 0.1)
    assert model.config.dropout == 0.1
    for weight, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved['model'][weight])

    # more characters
    larger = load_to_train(GPT, str(out_dir / name), 'more', add_characters(spec, 'z'), 0.0)
    assert larger.config.vocab_size == spec.vocab_size + 1

    # others
    for other in (char_spec('xyz'), GPT2):
        with pytest.raises(UserError, match='tokens of mine are not .* --tokenizer=.*out-toy'):
            load_to_train(GPT, str(out_dir / name), 'mine', other, 0.0)


def test_a_file_that_names_no_dataset_says_what_it_lacks(toy, tmp_path):
    """Following the advice, it is read with the tokens of that dataset."""
    spec = read_meta(toy)
    config = GPTConfig(8, spec.vocab_size, 1, 1, 4, bias=True)
    args = dict(block_size=8, vocab_size=spec.vocab_size, n_layer=1, n_head=1, n_embd=4, bias=True)
    payload = dict(model=GPT(config).state_dict(), model_args=args)
    torch.save(payload, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match="names no dataset, .* again with config=.'dataset': "):
        load_model(GPT, 'resume', tmp_path)

    torch.save({**payload, 'config': {'dataset': 'toy'}}, tmp_path / 'ckpt.pt')
    assert load_model(GPT, 'resume', tmp_path).spec == spec
