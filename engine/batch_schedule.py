"""How many sequences an iteration takes, and each rank's share of them."""

from engine.errors import UserError


def split_batch(n_sequences, batch_size, world_size):
    """(micro_steps, micro_batch_size) of one rank: an equal share of n_sequences in equal micro-batches, as
    large as batch_size allows. UserError where the ranks cannot share them equally."""
    if n_sequences % world_size:
        raise UserError(f'{n_sequences} sequences do not divide over {world_size} ranks')
    share = n_sequences // world_size
    micro_batch_size = next(size for size in range(min(batch_size, share), 0, -1) if share % size == 0)
    return share // micro_batch_size, micro_batch_size


class BatchSchedule:
    """The global batch: gradient_accumulation_steps * batch_size sequences, whatever the number of ranks.

    ramp_start, ramp_tokens: begin with ramp_start tokens, and grow linearly over the first ramp_tokens,
    in steps of ramp_start (GPT-3, arXiv:2005.14165, appendix B). 0 is no ramp. A batch depends only on the
    tokens before it, so a resumed run and any number of ranks take the same ones.
    Micro-batches have one size during the ramp, as ramp_start allows, and another after it: torch.compile
    compiles each of the two.
    Raises UserError for numbers that do not divide, with settings that do.
    """

    def __init__(self, gradient_accumulation_steps, batch_size, block_size, world_size, ramp_start=0, ramp_tokens=0):
        self.full, self.block_size, self.ramp_tokens = gradient_accumulation_steps * batch_size, block_size, ramp_tokens
        self.smallest = ramp_start // block_size or self.full
        if ramp_start and (ramp_start % block_size or self.smallest > self.full or self.full % self.smallest):
            fitting = max(n for n in range(1, min(self.smallest or 1, self.full) + 1) if self.full % n == 0)
            raise UserError(f'batch_ramp_start={ramp_start} is not a part of the {self.full} x {block_size} tokens that the full '
                            f'batch has; try --batch_ramp_start={fitting * block_size}')
        self.full_tokens = self.full * block_size
        try:
            self.smallest_split = split_batch(self.smallest, batch_size, world_size)
            self.full_split = split_batch(self.full, batch_size, world_size)
        except UserError as error:
            nearest = -(-gradient_accumulation_steps // world_size) * world_size
            fitting = next((n for n in range(self.smallest, self.full + 1) if self.full % n == 0 and n % world_size == 0), 0)
            advice = (f'--batch_ramp_start={fitting * block_size}' if ramp_start and fitting else
                      f'--gradient_accumulation_steps={nearest}')
            raise UserError(f'{error}; try {advice}') from None

    def n_sequences(self, tokens):
        """The sequences of the iteration that follows `tokens` tokens of training."""
        if tokens >= self.ramp_tokens:
            return self.full
        return self.smallest * (1 + (self.full // self.smallest - 1) * tokens // self.ramp_tokens)

    def split(self, tokens):
        """(micro_steps, micro_batch_size) of this rank in the iteration that follows `tokens` tokens of training."""
        if tokens >= self.ramp_tokens:
            return self.full_split
        micro_steps, micro_batch_size = self.smallest_split
        return micro_steps * self.n_sequences(tokens) // self.smallest, micro_batch_size

    def micro_steps(self, tokens):
        return self.split(tokens)[0]

    def iterations(self, sequences, tokens):
        """Yield (number of its first sequence, micro_steps, micro_batch_size) of each iteration after so much training."""
        while True:
            yield sequences, *self.split(tokens)
            n_sequences = self.n_sequences(tokens)
            sequences, tokens = sequences + n_sequences, tokens + n_sequences * self.block_size

    def tokens_after(self, iterations, tokens=0):
        """The tokens of training after so many more iterations."""
        while iterations and tokens < self.ramp_tokens:
            tokens, iterations = tokens + self.n_sequences(tokens) * self.block_size, iterations - 1
        return tokens + iterations * self.full * self.block_size
