"""Pure functions on tensors: no Ray, no vLLM, no input or output. An algorithm is a file, named as in the settings.

    grpo  rloo  remax  reinforce    outcomes of a step's prompts ─> one advantage a completion
    gigpo                           rewards and states of turns ─> one advantage a turn
    ppo                             rewards, discounts and values of actions ─> one advantage an action
    gspo  cispo                     advantages and probabilities ─> a loss an action, in the place of PPO's
    etpo                            Q, policy and reference over all actions ─> the policy's loss at an action
    tbrm                            logits, rewards and discounts ─> one residual a sequence
    archer                          features of states and utterances ─> one advantage an utterance
    etpo  archer_soft               Q of all actions ─> soft values, and what a policy and Q itself follow

What they have in common: sums over actions (advantages.py), distributions over actions (latent_actions.py), the losses
that an advantage enters, with its penalties (policy_loss.py), how they add up (aggregation.py), what another policy's
rollouts weigh (importance.py), how a batch is cut into optimizer steps (mini_batches.py), learning rates
(schedules.py), and small networks with their optimizers (heads.py).
"""
