# Trains GPT-2 medium, 355M parameters, on FineWeb-Edu. This config has not been run here.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_350m.py
#
# The shape is GPT-2's (Radford et al. 2019, table 2). That paper gives no learning rate. The
# learning rate, the warm-up over 375M tokens and the batch are those of GPT-3 350M (Brown et al.
# 2020, table 2.1 and appendix B).
out_dir = 'out-gpt2-350m'
dataset = 'fineweb_edu'
sampling = 'epoch'
wandb_run_name = 'gpt2-350M'

n_layer = 24
n_head = 16
n_embd = 1024

# 8 x 1024 x 64 = 524,288 tokens per iteration over all GPUs. The run reads 7.1 billion tokens, 20
# per parameter (Hoffmann et al. 2022), which is 0.72 epochs of sample-10BT.
batch_size = 8
block_size = 1024
gradient_accumulation_steps = 64
max_iters = 13600
lr_decay_iters = 13600

learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 715

eval_interval = 500
eval_iters = 100
log_interval = 10
