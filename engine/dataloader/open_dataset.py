"""Opens what the setting `dataset` names, and compares it with that of a saved run."""

from engine.dataloader.batches import TokenDataset
from engine.dataloader.mixture import MixedDataset, is_mixture
from engine.distributed import Environment
from engine.errors import UserError
from engine.tokenizer import TokenizerSpec, same_tokens


def open_dataset(
    name: str, env: Environment, sampling: str = 'windows', documents: str = 'any',
) -> TokenDataset | MixedDataset:
    """The dataset that the setting `dataset` names, on every rank: one of data/, or a mixture.

    The first rank of each machine checks the files and leaves the result in NAME.checked.json,
    which the others read. Raises UserError on all ranks as the two classes.
    """
    kind = TokenDataset
    if is_mixture(name):
        kind = MixedDataset

    data = None
    with env.raise_on_all_ranks():
        if env.local_rank == 0:
            data = kind(name, sampling, documents)

    with env.raise_on_all_ranks():
        if env.local_rank != 0:
            data = kind(name, sampling, documents)
    return data


def check_same_dataset(
    data: TokenDataset | MixedDataset, tokenizer: dict | None, fingerprint: str | None,
    accept_change: bool,
) -> None:
    """UserError where a saved run used another vocabulary than `data`, or another text.

    tokenizer, fingerprint: those of the run's dataset, or None where its checkpoint lacks them.
    accept_change: accept another text.
    """
    if tokenizer and not has_tokens_of(data, tokenizer):
        raise UserError(f'{data.name} has another vocabulary than the run that would go on, so '
                        f'its tokens mean other text; restore the dataset of the run, or train a '
                        f'new model in another --out_dir')

    if fingerprint and fingerprint != data.fingerprint and not accept_change:
        raise UserError(f'{data.name} is not what the run was trained on (fingerprint '
                        f'{data.fingerprint}, was {fingerprint}); restore it, or go on with '
                        f'--accept_dataset_change=True')


def has_tokens_of(data, tokenizer):
    """True where the dict `tokenizer`, of a checkpoint, gives a text the same ids as `data`."""
    try:
        spec = TokenizerSpec.from_dict(tokenizer)
    except UserError:               # a damaged file
        return False
    return same_tokens(spec, data.tokenizer)
