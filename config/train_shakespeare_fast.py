# Trains on Shakespeare's plays on a CPU, one token a character, with what came after GPT-2. Text,
# depth and width are those of the README's command for a CPU. In the same time it reaches a lower
# loss; studies/recipe.md has the figures.
#   python train.py config/train_shakespeare_fast.py
# Add --embedding_norm=True for a model that export.py can write, as transformers has this model
# only with that norm. In a short run it made the val loss 0.09 worse.
out_dir = 'out-shakespeare-fast'
sample_tokens = 200                 # printed after each evaluation
dataset = 'shakespeare_char'
eval_interval = 277
eval_iters = 10                     # 240 windows, as in 20 batches of 12
log_interval = 10
always_save_checkpoint = False
device = 'cpu'
compile = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'fast'

gradient_accumulation_steps = 1
batch_size = 24
block_size = 64

n_layer = 4
n_head = 2
n_embd = 128

position = 'rotary'
norm = 'rmsnorm'                    # it has no parameters
qk_norm = True
activation = 'relu2'
tied = False
softcap = 15.0
zero_init = True

optimizer = 'muon'
learning_rate = 1e-2                # rate of the embedding and the head
muon_lr = 0.02
muon_momentum = 0.85                # 0.95 is for longer runs
weight_decay = 0.0
beta2 = 0.99
max_iters = 831
lr_schedule = 'linear'              # the rate falls from the first iteration on
lr_decay_iters = 831
warmup_iters = 0
min_lr = 0.0
