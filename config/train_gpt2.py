# Trains GPT-2 124M on OpenWebText from scratch. Model and optimizer are train.py's defaults.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
out_dir = 'out-gpt2'
wandb_log = True
wandb_run_name = 'gpt2-124M'

# 12 x 1024 x 40 = 491,520 tokens per iteration over all GPUs, 295 billion in the whole run.
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 40
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
log_interval = 10
