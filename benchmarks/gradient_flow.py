"""The figures of docs/gradient-flow.md."""
import sys
from pathlib import Path
import torch
from fixup_core.chains import VARIANTS, build_chain
from fixup_core.gradient_flow import gradient_flow, plot_flows
torch.manual_seed(0)
x=torch.randn(128,64); y=torch.randint(10,(128,))
flows={}
for v in VARIANTS:
    net=build_chain(v,zero_head=False)
    layers=["first",*(f"links.{i}" for i in range(50))]
    flows[v]=gradient_flow(net,x,y,layers=layers)
    print(v, flows[v].loss, flows[v].decay, flows[v].rows[0], flows[v].rows[-1])
plot_flows(flows,Path("/tmp/w/gv/flow.png"),quantities=("gradient_rms","activation_rms"))
