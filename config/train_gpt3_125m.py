# Trains by GPT-3 125M's recipe on FineWeb-Edu. This config has not been run here.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt3_125m.py
#
# The source is Brown et al. 2020, table 2.1 and appendix B. GPT-3 alternates dense and sparse
# attention; here all attention is dense.
#
# Prepare data/fineweb_edu with --sample=sample-350BT for a run of this length. Or shorten the run
# to the 10 billion tokens of sample-10BT with
#   --max_iters=19630 --lr_decay_iters=19000 --batch_ramp_tokens=130_000_000
out_dir = 'out-gpt3-125m'
dataset = 'fineweb_edu'
sampling = 'epoch'
wandb_run_name = 'gpt3-125M'

n_layer = 12
n_head = 12
n_embd = 768

# 8 x 2048 x 32 = 524,288 tokens per iteration over all GPUs, 300 billion in the whole run.
batch_size = 8
block_size = 2048
gradient_accumulation_steps = 32
max_iters = 591580

# An iteration begins with 32,768 tokens, and reaches the whole batch after 4 billion tokens.
batch_ramp_start = 32_768
batch_ramp_tokens = 4_000_000_000

learning_rate = 6e-4
min_lr = 6e-5
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1.0
warmup_iters = 715                  # 375 million tokens
lr_decay_iters = 495911             # 260 billion tokens; then the rate stays at min_lr

eval_interval = 1000
eval_iters = 100
log_interval = 10
