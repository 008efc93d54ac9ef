"""Is the advice still as good as it was promised to be, and what is served with it?

outcomes    recommendations joined with the trials that followed them
promise     how good the champion was on tasks left out: what outcomes are compared with
limits      from which value on a statistic is no chance any more: simulated histories without any change
watches     regret, intervals and chances of the decisions since the champion was chosen (Page-Hinkley, windows)
drift       profiles of incoming tasks against those that the champion learned from (KS, means)
remeasure   kept profiles against what their tasks measure like now
served      errors and latency of servers, feedback on adapters
alerts      what a person is told; `channels` carries it, `state` remembers what was said
benefit     what retraining would gain, judged on tasks left out
monitor     all of it together: `metapeft monitor`
"""
