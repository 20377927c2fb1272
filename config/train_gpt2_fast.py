# GPT-2 124M in fewer tokens, on FineWeb-Edu; with --dataset=openwebtext on OpenWebText. Not run yet: studies/recipe.md says what
# each part is worth by published figures. On one GPU, and on eight:
#   python train.py config/train_gpt2_fast.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
out_dir = 'out-gpt2-fast'
dataset = 'fineweb_edu'
wandb_run_name = 'gpt2-fast'

# 16 x 1024 x 32 = 524,288 tokens per iteration over all GPUs, 2.67 billion in the whole run
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 32    # one, two, four or eight GPUs share them
max_iters = 5100
eval_interval = 250
eval_iters = 100
log_interval = 10

# 162 million parameters, as the untied head has 39 million of its own
position = 'rotary'
norm = 'rmsnorm'                    # without parameters
qk_norm = True
embedding_norm = True
activation = 'relu2'
tied = False
softcap = 15.0
zero_init = True

optimizer = 'muon'
muon_lr = 0.02                      # of the matrices in the blocks
learning_rate = 3e-3                # of the embedding and the head, by AdamW
weight_decay = 0.0
beta2 = 0.95
lr_schedule = 'wsd'                 # constant, then linear
warmup_iters = 0
lr_decay_iters = 5100
cooldown_iters = 1450
min_lr = 0.0
