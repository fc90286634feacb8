//! Groups of frozen projections with their adapters, loaded from a weight source.

use super::WeightSource;
use super::adapter::AdapterLayout;
use super::config::{ModelConfig, Proj};
use crate::backend::{Backend, Linear, Lora, Needs, Projection};
use crate::error::{Error, Result};
use crate::tensor::HostMatrix;

/// Loads the projections of `layer` that read the same input, side by side in the order given; `needs` grows with them.
pub(super) fn load_linear<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    layout: &AdapterLayout,
    source: &mut dyn WeightSource,
    layer: usize,
    projections: &[Proj],
    needs: &mut Needs,
) -> Result<Linear<B>> {
    let (_, k) = config.dims(projections[0]);
    let mut in_4bit = 0;
    let mut group = Linear { k, n: 0, r: 0, parts: Vec::with_capacity(projections.len()) };
    for &proj in projections {
        let (n, k) = config.dims(proj);
        let module = proj.module(layer);
        let host = source.matrix(&format!("{module}.weight"))?;
        check_len("matrix", n * k, host.dims().0 * host.dims().1)?;
        if !matches!(host, HostMatrix::Dense(_)) {
            in_4bit += n * k;
            needs.part = needs.part.max(n * k);
        }
        let w = backend.upload(&host)?;
        let bias = match config.has_bias(proj) {
            true => Some(load_vector(backend, source, &format!("{module}.bias"), n)?),
            false => None,
        };
        let site = layout.sites.iter().find(|s| s.layer == layer && s.proj == proj);
        let lora = site.map(|s| Lora { a: s.a, b: s.b, r: s.r, scale: s.scale, site: s.site });
        group.n += n;
        group.r += lora.as_ref().map_or(0, |l| l.r);
        group.parts.push(Projection { n, w, bias, lora });
    }
    needs.group = needs.group.max(in_4bit);
    (needs.n, needs.k, needs.r) = (needs.n.max(group.n), needs.k.max(k), needs.r.max(group.r));
    Ok(group)
}

/// Loads a norm weight or a bias of `len` elements.
pub(super) fn load_vector<B: Backend>(
    backend: &mut B,
    source: &mut dyn WeightSource,
    name: &str,
    len: usize,
) -> Result<B::Act> {
    let host = source.vector(name)?;
    check_len("vector", len, host.len())?;
    let mut w = backend.alloc_act(len)?;
    backend.write_act(&mut w, &host.to_f32())?;
    Ok(w)
}

/// The source has checked shapes against the file already; this guards the graph against any other source.
fn check_len(argument: &'static str, expected: usize, found: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Shape { op: "load", argument, found, expected }) }
}
