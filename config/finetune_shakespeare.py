# GPT-2 XL, a few minutes on Shakespeare. Prepare data/shakespeare first.
# On a smaller GPU add --init_from=gpt2-large, gpt2-medium or gpt2.
# The recipe that nanoGPT published has the same settings but for these: --max_iters=20 --patience=0
out_dir = 'out-shakespeare'
init_from = 'gpt2-xl'
dataset = 'shakespeare'
wandb_project = 'shakespeare'
wandb_run_name = 'finetune'

# studies/finetuning.md has the study of a small model from which the settings named "measured" come.
eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False      # keeps the best weights: the val loss rises again (measured)
patience = 2                        # ends the run 10 iterations after the best ones (measured)

batch_size = 1
gradient_accumulation_steps = 32    # 32 x 1024 tokens per iteration; Shakespeare has 301,966 (published)
max_iters = 60                      # 6.5 passes over the text, if patience does not end the run before

learning_rate = 3e-5                # (published) a small model cannot tell the rate of a large one; try 1e-5 and 1e-4 too
decay_lr = False                    # no warm-up and no decay (published): neither lowers the loss (measured)
dropout = 0.0                       # (published) 0.1 and 0.2 make no difference (measured)
