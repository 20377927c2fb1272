"""A training step and a run.

run: the Run, its batch and its progress; start_run. parallel: a model over its ranks. optim: AdamW
and Muon. settings_checks: what the settings of train.py may be. chunked_loss: the loss without
whole logits. lora: adapters of low rank. freeze: layers that are not trained. context: a longer or
shorter context. mean_loss: the loss over an evaluation. cpu: memory on a CPU. plan: memory and time
of a step, by arithmetic.
It imports checkpoint, metrics and dataloader; never evaluation, generation, hf or prepare.
"""
