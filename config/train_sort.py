# A GPT learns to sort six digits, on a laptop's CPU. First write the digits, then train, then count
# the right answers:
#   python data/sort/prepare.py
#   python train.py config/train_sort.py
#   python evaluate.py --out_dir=out-sort --tasks=exact --data=data/sort
out_dir = 'out-sort'
init_from = 'auto'                  # the same command again resumes the run
dataset = 'sort'
eval_interval = 100
eval_iters = 2
log_interval = 50
always_save_checkpoint = False
wandb_project = 'sort'

gradient_accumulation_steps = 1
batch_size = 256
block_size = 13                     # one record

n_layer = 2
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 3e-3
max_iters = 600
lr_decay_iters = 600
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 50
