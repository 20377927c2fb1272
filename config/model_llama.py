# The shape of Llama. transformers loads it as LlamaForCausalLM, and with qk_norm=True as
# Qwen3ForCausalLM. Put this config before the config of a run:
#   python train.py config/model_llama.py config/train_shakespeare_char.py
position = 'rotary'
norm = 'rmsnorm_gain'
activation = 'swiglu'
bias = False
