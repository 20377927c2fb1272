# The shape of nanochat. transformers loads it as NanoChatForCausalLM. Put this config before the
# config of a run:
#   python train.py config/model_nanochat.py config/train_shakespeare_char.py
position = 'rotary'
norm = 'rmsnorm'                    # it has no parameters
qk_norm = True
embedding_norm = True
activation = 'relu2'
bias = False
tied = False
softcap = 15.0
