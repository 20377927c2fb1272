# Finetunes GPT-2 on conversations, in its own tokens and one more for each marker. First write the
# conversations, here those that are made by rules; --input=FILE takes your own:
#   python data/chat/prepare.py --tokenizer=gpt2 --name=chat_gpt2
#   python train.py config/finetune_chat.py
#   python evaluate.py --out_dir=out-chat-gpt2 --tasks=held_out --data=data/chat_gpt2 --chat=True
# On a larger GPU add --init_from=gpt2-medium, gpt2-large or gpt2-xl.
out_dir = 'out-chat-gpt2'
init_from = 'gpt2'
dataset = 'chat_gpt2'
documents = 'whole'                 # each sequence starts at a conversation
wandb_project = 'chat'
wandb_run_name = 'finetune'

eval_interval = 25
eval_iters = 10
log_interval = 1
always_save_checkpoint = False      # keep the best weights
patience = 3                        # end the run 75 iterations after the best one

# 32 x 256 tokens per iteration, of which about a third are answers
batch_size = 8
gradient_accumulation_steps = 4
block_size = 256
max_iters = 300
lr_decay_iters = 300
warmup_iters = 20                   # the rows of the new tokens begin as the mean of the others

# Above the rate of finetune_shakespeare, as the text is further from GPT-2's; not measured.
learning_rate = 1e-4
min_lr = 1e-5
dropout = 0.0
