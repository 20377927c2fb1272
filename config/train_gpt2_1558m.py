# Trains GPT-2 XL, 1,558M parameters, on FineWeb-Edu. This config has not been run here.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_1558m.py
#
# The shape is GPT-2's (Radford et al. 2019, table 2). That paper gives no learning rate. The
# learning rate, the warm-up over 375M tokens and the batch are those of GPT-3 1.3B (Brown et al.
# 2020, table 2.1 and appendix B).
out_dir = 'out-gpt2-1558m'
dataset = 'fineweb_edu'
sampling = 'epoch'
wandb_run_name = 'gpt2-1558M'

n_layer = 48
n_head = 25
n_embd = 1600

# 4 x 1024 x 256 = 1,048,576 tokens per iteration over all GPUs. The run reads 31.2 billion tokens,
# 20 per parameter (Hoffmann et al. 2022). Prepare them with
#   python data/fineweb_edu/prepare.py --sample=sample-100BT
batch_size = 4
block_size = 1024
gradient_accumulation_steps = 256
max_iters = 29800
lr_decay_iters = 29800

learning_rate = 2e-4
min_lr = 2e-5
warmup_iters = 358

eval_interval = 500
eval_iters = 100
log_interval = 10
