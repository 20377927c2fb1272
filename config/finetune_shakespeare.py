# GPT-2 XL, a few minutes on Shakespeare. Prepare data/shakespeare first.
# On a smaller GPU add --init_from=gpt2-large, gpt2-medium or gpt2.
out_dir = 'out-shakespeare'
init_from = 'gpt2-xl'
dataset = 'shakespeare'
wandb_project = 'shakespeare'
wandb_run_name = 'finetune'

eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False      # 20 iterations are more than two passes over the text

batch_size = 1
gradient_accumulation_steps = 32    # 32 x 1024 tokens per iteration; Shakespeare has 301,966
max_iters = 20

learning_rate = 3e-5                # constant: too short a run to decay
decay_lr = False
