# Shakespeare's plays on a CPU, one token a character, with everything that docs/recipe.md tries: the same text, width and
# depth as the README's CPU command.
#   python train.py config/train_shakespeare_fast.py
out_dir = 'out-shakespeare-fast'
sample_tokens = 200                 # after each evaluation
dataset = 'shakespeare_char'
eval_interval = 200
eval_iters = 20
log_interval = 10
always_save_checkpoint = False
device = 'cpu'
compile = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'fast'

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

position = 'rotary'
norm = 'rmsnorm'                    # without parameters
qk_norm = True
activation = 'relu2'
tied = False
softcap = 15.0
zero_init = True

optimizer = 'muon'
learning_rate = 1e-2                # of the embedding and the head
muon_lr = 0.01
weight_decay = 0.1
beta2 = 0.99
max_iters = 1300
lr_schedule = 'wsd'                 # constant, then linear
lr_decay_iters = 1300
cooldown_iters = 520
warmup_iters = 0
min_lr = 0.0
