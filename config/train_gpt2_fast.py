# A model of GPT-2 124M's size that learns from fewer tokens of FineWeb-Edu, or of OpenWebText with
# --dataset=openwebtext. This config has not been run yet. studies/recipe.md says what each part is
# worth by published figures. On one GPU, and on eight:
#   python train.py config/train_gpt2_fast.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
out_dir = 'out-gpt2-fast'
dataset = 'fineweb_edu'
wandb_run_name = 'gpt2-fast'

# 16 x 1024 x 32 = 524,288 tokens per iteration over all GPUs, 2.67 billion in the whole run.
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 32    # one, two, four or eight GPUs share them
max_iters = 5100
eval_interval = 250
eval_iters = 100
log_interval = 10

# The model has 162 million parameters, as the untied head has 39 million of its own.
position = 'rotary'
norm = 'rmsnorm'                    # it has no parameters
qk_norm = True
embedding_norm = True
activation = 'relu2'
tied = False
softcap = 15.0
zero_init = True

optimizer = 'muon'
muon_lr = 0.02                      # rate of the matrices in the blocks
learning_rate = 3e-3                # AdamW's rate, of the embedding and the head
weight_decay = 0.0
beta2 = 0.95
lr_schedule = 'wsd'                 # constant, then linear to min_lr
warmup_iters = 0
lr_decay_iters = 5100
cooldown_iters = 1450
min_lr = 0.0
