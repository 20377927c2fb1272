# GPT-2 124M on OpenWebText, to a val loss of about 2.85:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# 12 x 1024 x 40 = 491,520 tokens per iteration, whatever the number of GPUs; 295 billion in all.
out_dir = 'out-gpt2'
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 40

max_iters = 600000
lr_decay_iters = 600000
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200
log_interval = 10
