"""The optimizers, AdamW and Muon: parameter groups, the learning rate, their state in checkpoints.

Only this file knows the names of moments. Only it and train.py's train_step know `found_inf`,
PyTorch's flag that makes a step change nothing.
"""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist

from engine import distributed
from engine.checkpoint.contents import Checkpoint
from engine.device import cpu_multiplies_bfloat16
from engine.errors import UserError
from engine.training import parallel

# Muon
FIRST_MOMENTUM = 0.85
MOMENTUM_WARMUP = 300                           # iterations until the momentum is muon_momentum
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)        # factors of x, x^3 and x^5
PRECISION = torch.bfloat16                      # of the Newton-Schulz steps; see precision_on

MOMENTS_OF_ADAMW = ('exp_avg', 'exp_avg_sq')
MOMENTS_OF_MUON = ('momentum_buffer',)


def build(name: str, model: torch.nn.Module, learning_rate: float, weight_decay: float,
          betas: tuple, muon_lr: float, muon_momentum: float = 0.95) -> torch.optim.Optimizer:
    """The optimizer 'adamw' or 'muon' of `model`.

    muon_lr: the highest learning rate of the matrices that Muon updates. muon_momentum: their
    momentum after its warm-up.
    """
    if name not in ('adamw', 'muon'):
        raise UserError(f"optimizer={name!r} is unknown; try 'adamw' or 'muon'")
    if name == 'adamw':
        return adamw(model, learning_rate, weight_decay, betas)
    return Muon(model, learning_rate, weight_decay, betas, muon_lr, muon_momentum)


def adamw(model: torch.nn.Module, learning_rate: float, weight_decay: float,
          betas: tuple) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings, none on biases and norms.

    The order of groups and parameters is nanoGPT's, so that the optimizer states of its
    checkpoints fit. Fused on every device: on a CPU that is three times as fast as the loop.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = decayed_and_not(parameters, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def decayed_and_not(parameters, weight_decay):
    """Two parameter groups: matrices and embeddings, which decay, and vectors, which do not."""
    return [
        dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0),
    ]


class Muon(torch.optim.AdamW):
    """Muon for the matrices of the blocks, AdamW for embeddings, an untied head, biases and norms.

    A matrix moves by its momentum with all singular values brought near 1. The formula is that of
    torch.optim.Muon with adjust_lr_fn='original': Nesterov momentum, five Newton-Schulz steps in
    bfloat16 where the device has it, the rate times sqrt(rows / columns) where that is above 1,
    decoupled weight decay.
    Two things differ. Where one weight holds several matrices (queries, keys and values; the gate
    and the value of SwiGLU), each is updated by itself. And matrices of one shape go through
    Newton-Schulz together, which is faster. Under DDP each rank takes a share of the matrices.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """

    def __init__(self, model, learning_rate, weight_decay, betas, muon_lr, muon_momentum):
        blocks = model.transformer.h
        matrices = [p for p in blocks.parameters() if p.dim() == 2 and p.requires_grad]
        if not matrices:
            raise UserError('optimizer=muon has no matrix to update, as every block is frozen; '
                            'try --optimizer=adamw')
        ids = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in ids and p.requires_grad]
        rows = rows_of_matrices(model)

        muon_group = dict(
            params=matrices, weight_decay=weight_decay,
            lr=muon_lr, lr_scale=muon_lr / learning_rate,
            momentum=muon_momentum, last_momentum=muon_momentum,
            rows=[rows.get(id(p), [len(p)]) for p in matrices])
        groups = [muon_group, *decayed_and_not(others, weight_decay)]
        super().__init__(groups, lr=learning_rate, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.update_matrices(groups[0])
        self.param_groups = groups[1:]                  # AdamW updates these
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def update_matrices(self, group):
        # 1 where the step may change something, 0 where it may not, on the device
        found_inf = getattr(self, 'found_inf', None)
        enabled = torch.ones((), device=group['params'][0].device)
        if found_inf is not None:
            enabled = (found_inf == 0).float()

        # the momentum of every matrix, those of one shape together; a tall one is turned
        moves = {}                                      # shape: [(matrix, its momentum)]
        for p, rows in zip(group['params'], group['rows']):
            momentum = self.update_momentum(p, group['momentum'], enabled)
            p.mul_(1 - group['lr'] * group['weight_decay'] * enabled)
            for matrix, move in zip(p.split(rows), momentum.split(rows)):
                if matrix.size(0) > matrix.size(1):
                    move = move.t()
                moves.setdefault(move.shape, []).append((matrix, move))

        for pairs in moves.values():
            updates = orthogonalize_on_ranks(torch.stack([move for _, move in pairs]))
            for (matrix, _), update in zip(pairs, updates):
                if update.shape != matrix.shape:
                    update = update.t()
                stretch = math.sqrt(max(1, matrix.size(0) / matrix.size(1)))
                matrix.sub_(update * (group['lr'] * stretch * enabled))

    def update_momentum(self, p, factor, enabled):
        """The Nesterov momentum of the parameter p, after its gradient joined the buffer."""
        gradient = p.grad.nan_to_num_(0.0, 0.0, 0.0)    # the product with enabled = 0 is then 0
        state = self.state[p]
        if not state:
            state['step'] = torch.zeros((), device=p.device)    # AdamW wants one when it loads
            state['momentum_buffer'] = torch.zeros_like(p)
        state['step'] += enabled
        buffer = state['momentum_buffer'].lerp_(gradient, (1 - factor) * enabled)
        return gradient.lerp(buffer, factor)


def rows_of_matrices(model):
    """{id of a weight: rows of each matrix in it}, for the weights that hold several matrices."""
    config = model.config
    heads = (config.n_head, config.kv_heads, config.kv_heads)       # queries, keys, values
    rows = {}
    for block in model.transformer.h:
        rows[id(block.attn.c_attn.weight)] = [n * config.head_size for n in heads]
        if config.activation == 'swiglu':
            rows[id(block.mlp.c_fc.weight)] = [config.mlp_width] * 2
    return rows


def orthogonalize_on_ranks(x):
    """orthogonalize(x), of which each rank computes an equal part. A collective.

    x: (N, rows, columns), the same on all ranks, as their gradients are.
    """
    if not dist.is_initialized():
        return orthogonalize(x)

    n_ranks = dist.get_world_size()
    size = math.ceil(len(x) / n_ranks)
    first = dist.get_rank() * size
    own = x.new_zeros(size, *x.shape[1:])           # zeros, where a rank has fewer matrices
    given = x[first:first + size]
    own[:len(given)] = given

    own = orthogonalize(own)
    whole = own.new_empty(n_ranks * size, *x.shape[1:])
    dist.all_gather_into_tensor(whole, own)
    return whole[:len(x)]


def orthogonalize(x):
    """Each of the matrices x (N, rows, columns), rows <= columns, with all singular values moved
    to within about 0.3 of 1, by five steps of a Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    precision = precision_on(x.device)
    if precision == torch.float16:                  # small gradients would become zero
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    x = x.to(precision)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT                                             # (N, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def precision_on(device):
    """PRECISION, or what a device has that does not multiply bfloat16.

    A GPU then takes float16. Its range is smaller, which suffices: no number here is much above 1.
    A CPU takes float32, as it would emulate bfloat16 and take ten times as long.
    """
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    if device.type == 'cpu' and not cpu_multiplies_bfloat16():
        return torch.float32
    return PRECISION


# One step

def set_lr(optimizer: torch.optim.Optimizer, learning_rate: float,
           iteration: int = MOMENTUM_WARMUP):
    """Set the learning rate of every parameter group.

    Muon's matrices keep their ratio to it, and their momentum changes linearly from 0.85 at
    iteration 0 to muon_momentum at iteration 300.
    """
    warm = min(1, iteration / MOMENTUM_WARMUP)
    for group in optimizer.param_groups:
        group['lr'] = learning_rate * group.get('lr_scale', 1)
        if 'momentum' in group:
            rise = group['last_momentum'] - FIRST_MOMENTUM
            group['momentum'] = FIRST_MOMENTUM + rise * warm


def clip_grad_norm(optimizer: torch.optim.Optimizer, grad_clip: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most grad_clip; 0 leaves them.

    Returns the norm before that, of all ranks together: a scalar tensor, not read yet.
    """
    parameters = parameters_of(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    if distributed.is_shard(norm):
        norm = norm.full_tensor()
    return norm


# Checkpoints

def load_state_dict(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                    saved: Checkpoint | None):
    """Restore the moments and the loss scale from a loaded state, as far as it has them.

    saved: the state that the run goes on from, or None, which changes nothing.
    The learning rate, betas and weight decay of `optimizer` stay. Raises UserError where the
    moments do not fit its parameters.
    """
    if saved is None or saved.optimizer is None:
        return
    check_same_optimizer(optimizer, saved)
    groups = optimizer.state_dict()['param_groups']
    with refuse_malformed_state(optimizer):
        if scaler.is_enabled() and saved.scaler:
            scaler.load_state_dict(saved.scaler)
        saved_groups = [group['params'] for group in saved.optimizer['param_groups']]
        moments = read_moments(optimizer, saved.optimizer['state'])

    if saved_groups != [group['params'] for group in groups] or not fits(moments, optimizer):
        raise UserError('the optimizer state belongs to a model of another shape, or to one of '
                        'which other layers are frozen')
    optimizer.load_state_dict({'state': moments, 'param_groups': groups})


def check_same_optimizer(optimizer: torch.optim.Optimizer, saved: Checkpoint) -> None:
    """Raise UserError where the optimizer of a state is of another kind than `optimizer`, or has
    fewer or more parameters.

    This reads no moments, so it can come before those of a sharded state are read.
    """
    kind = kind_of(optimizer)
    with refuse_malformed_state(optimizer):
        groups = saved.optimizer['param_groups']
        was_muon = any('momentum' in group for group in groups)
        n_saved = sum(len(group['params']) for group in groups)

    if was_muon != (kind == 'muon'):
        other = 'muon' if was_muon else 'adamw'
        raise UserError(f'the run was trained with optimizer={other}, whose state '
                        f'optimizer={kind} cannot take; go on with --optimizer={other}')

    n_trained = len(parameters_of(optimizer))
    if n_saved != n_trained:
        raise UserError(f'the optimizer state is of {n_saved} weights, and {n_trained} are trained '
                        f'now; go on with the --freeze of the run and the same shape')


@contextmanager
def refuse_malformed_state(optimizer):
    """Turn what a state that is none of this optimizer raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f'the optimizer state is not one of {kind_of(optimizer)} '
                        f'({type(error).__name__}: {error})') from None


def kind_of(optimizer):
    """The setting `optimizer` that builds one like this."""
    if isinstance(optimizer, Muon):
        return 'muon'
    return 'adamw'


def parameters_of(optimizer):
    """The parameters in the order in which a state numbers them."""
    return [p for group in optimizer.param_groups for p in group['params']]


def read_moments(optimizer, state):
    """{number of a parameter: its moments}, sharded as the parameter is, in memory of their own."""
    parameters = parameters_of(optimizer)
    n_matrices = len(optimizer.param_groups[0]['params']) if isinstance(optimizer, Muon) else 0
    moments = {}
    for index, saved in state.items():
        names = MOMENTS_OF_MUON if index < n_matrices else MOMENTS_OF_ADAMW
        moments[index] = {'step': torch.tensor(float(saved['step']))}
        for name in names:
            value = parallel.shard_like(parameters[index], saved[name])
            moments[index][name] = value.clone()
    return moments


def fits(moments, optimizer):
    """True where each moment has its parameter's shape, and all parameters or none have moments."""
    parameters = parameters_of(optimizer)
    shapes_fit = all(value.shape == parameters[index].shape
                     for index, values in moments.items()
                     for name, value in values.items() if name != 'step')
    return shapes_fit and len(moments) in (0, len(parameters))
