# A small GPT to talk to, about sums, sorting, spelling, days and months, on a laptop's CPU. First
# write the conversations, then train, then count the right answers:
#   python data/chat/prepare.py
#   python train.py config/train_chat.py
#   python evaluate.py --out_dir=out-chat --tasks=held_out --data=data/chat --chat=True
out_dir = 'out-chat'
init_from = 'auto'                  # the same command again resumes the run
dataset = 'chat'
documents = 'whole'                 # each sequence starts at a conversation
eval_interval = 200
eval_iters = 5
log_interval = 50
wandb_project = 'chat'

gradient_accumulation_steps = 1
batch_size = 8
block_size = 256                    # a few questions and answers: a token is a letter

n_layer = 4
n_head = 2
n_embd = 128
dropout = 0.0

# what learns sooner than GPT-2, by studies/recipe.md, in a shape that export.py can write
position = 'rotary'
norm = 'rmsnorm'                    # it has no parameters
qk_norm = True
embedding_norm = True
activation = 'relu2'
tied = False
zero_init = True

optimizer = 'muon'
learning_rate = 1e-2                # rate of the embedding and the head
muon_lr = 0.02
weight_decay = 0.0
beta2 = 0.99
max_iters = 1200
lr_schedule = 'wsd'
lr_decay_iters = 1200
cooldown_iters = 300                # the rate falls to min_lr at the end
warmup_iters = 0
min_lr = 0.0
