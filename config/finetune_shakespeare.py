# Finetunes GPT-2 XL on Shakespeare, which takes a few minutes. Prepare data/shakespeare first:
#   python data/shakespeare/prepare.py
# On a smaller GPU add --init_from=gpt2-large, gpt2-medium or gpt2.
#
# The recipe that nanoGPT published differs in two settings only: --max_iters=20 --patience=0
# Below, "published" marks what comes from that recipe, and "measured" what comes from the study of
# a small model in studies/finetuning.md.
out_dir = 'out-shakespeare'
init_from = 'gpt2-xl'
dataset = 'shakespeare'
wandb_project = 'shakespeare'
wandb_run_name = 'finetune'

eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False      # keep the best weights: the val loss rises again (measured)
patience = 2                        # end the run 10 iterations after the best one (measured)

# 32 x 1024 tokens per iteration (published). Shakespeare has 301,966 tokens, so 60 iterations are
# 6.5 passes over the text, unless patience ends the run before.
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 60

# The rate is published. A small model cannot tell the best rate of a large one, so try 1e-5 and
# 1e-4 too.
learning_rate = 3e-5
decay_lr = False                    # published; warm-up and decay do not lower the loss (measured)
dropout = 0.0                       # published; 0.1 and 0.2 make no difference (measured)
