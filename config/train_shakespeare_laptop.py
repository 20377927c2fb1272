# Trains on Shakespeare's plays for about half an hour of two CPU cores, to the loss that nanoGPT
# reaches on an A100. studies/recipe.md has the figures, and what was tried.
#   python train.py config/train_shakespeare_laptop.py
# Add --embedding_norm=True for a model that export.py can write, as transformers has this model
# only with that norm. In a short run it made the val loss 0.09 worse.
out_dir = 'out-shakespeare-laptop'
sample_tokens = 200                 # printed after each evaluation
dataset = 'shakespeare_char'
eval_interval = 550
eval_iters = 30                     # 240 windows
log_interval = 10
always_save_checkpoint = True       # the last model counts, whatever its val loss
device = 'cpu'
compile = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'laptop'

gradient_accumulation_steps = 1
batch_size = 8
block_size = 256

n_layer = 6
n_head = 3
n_embd = 192
dropout = 0.1
attention_dropout = False           # the fast attention of a CPU has none

position = 'rotary'
norm = 'rmsnorm'                    # it has no parameters
qk_norm = True
activation = 'relu2'
tied = False
softcap = 15.0
zero_init = True

optimizer = 'muon'
learning_rate = 5e-3                # rate of the embedding and the head
muon_lr = 0.01
muon_momentum = 0.85
weight_decay = 0.0
beta2 = 0.99
max_iters = 2200
lr_schedule = 'linear'              # the rate falls from the first iteration on
lr_decay_iters = 2200
warmup_iters = 0
min_lr = 0.0
