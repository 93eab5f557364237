"""Pure functions on tensors: no Ray, no vLLM, no input or output. An algorithm is a file, named as in the settings.

    grpo  rloo  remax  reinforce    outcomes of a step's prompts ─> one advantage per completion
    gigpo                           rewards and states of turns ─> one advantage per turn
    ppo                             rewards, discounts and values of actions ─> one advantage per action
    gspo  cispo                     advantages and probabilities ─> one loss per action, in place of PPO's
    etpo                            Q, policy and reference over all actions ─> the policy's loss at an action
    tbrm                            logits, rewards and discounts ─> one residual per sequence
    archer                          features of states and utterances ─> one advantage per utterance
    etpo  archer_soft               Q of all actions ─> soft values; targets of a policy and of Q itself

Shared parts: when outcomes differ (advantages.py), distributions over actions (latent_actions.py), losses of advantages
with their penalties, and sums over actions (policy_loss.py), how these losses add up (aggregation.py), weights of
another policy's rollouts (importance.py), how a batch is cut into optimizer steps (mini_batches.py), learning rates
(schedules.py), and small networks with their optimizers (heads.py).
"""
