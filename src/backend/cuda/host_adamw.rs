//! AdamW on the host: gradients come, updated weights go.

use half::bf16;

use super::Cuda;
use crate::backend::cpu::Cpu;
use crate::backend::{Adamw, Backend, NewOptimizer, OptimizerState};
use crate::error::Result;

/// Master weights, m and v in host memory.
pub struct Optimizer {
    host: Cpu,
    state: <Cpu as Backend>::Optimizer,
}

pub(super) fn new(of: NewOptimizer) -> Result<Optimizer> {
    let mut host = Cpu::new(None);
    let state = host.new_optimizer(of)?;
    Ok(Optimizer { host, state })
}

pub(super) fn read(src: &Optimizer) -> Result<OptimizerState> {
    Cpu::new(Some(1)).read_optimizer(&src.state)
}

pub(super) fn write(dst: &mut Optimizer, src: &OptimizerState) -> Result<()> {
    dst.host.write_optimizer(&mut dst.state, src)
}

pub(super) fn adamw(cuda: &Cuda, a: Adamw<Cuda>) -> Result<()> {
    let (mut grads, mut norm) = (vec![0.0; a.grads.len()], vec![0.0; 1]);
    cuda.read(a.grads.view(), &mut grads)?;
    cuda.read(a.norm.view(), &mut norm)?;
    if !norm[0].is_finite() {
        return Ok(());
    }
    let mut lora = vec![0.0; a.lora.len()];
    let Optimizer { host, state } = a.state;
    host.adamw(Adamw {
        state,
        lora: &mut lora,
        grads: &grads,
        norm: &norm,
        groups: a.groups,
        beta1: a.beta1,
        beta2: a.beta2,
        eps: a.eps,
        max_grad_norm: a.max_grad_norm,
        step: a.step,
    })?;
    let rounded: Vec<bf16> = lora.iter().map(|&x| bf16::from_f32(x)).collect();
    cuda.write(a.lora.view_mut(), &rounded)
}
