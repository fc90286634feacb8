//! What a piece of work launches, as the driver sees it: each kernel with its launch, its registers, and its occupancy. Kernels
//! of ours, of cuBLAS and of a user's file are told alike, since all of it is read off a recording.

use cpp_demangle::{DemangleOptions, Symbol};
use cudarc::driver::{CudaGraph, sys};
use serde::Serialize;

use super::module::{Attributes, attributes, blocks_per_multiprocessor, driver_version};
use super::{Cuda, driver_error};
use crate::error::Result;

/// One launch of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Launched {
    /// Without its parameters; "" where the driver is too old to tell (before CUDA 12.3).
    pub kernel: String,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Bytes of a block, asked for at the launch.
    pub dynamic_shared_bytes: u32,
    #[serde(flatten)]
    pub attributes: Attributes,
    /// Blocks that one multiprocessor runs at a time.
    pub blocks_per_multiprocessor: u32,
    /// Share of the threads of a multiprocessor that run so, to four digits.
    pub occupancy: f64,
}

impl Cuda {
    /// The kernels that `f` launches, in order; it has run once before, and does not run now. Nothing of what cannot be
    /// recorded.
    pub fn launched(&mut self, f: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Vec<Launched>> {
        match self.record(f)? {
            Some(graph) => self.launches_of(&graph),
            None => Ok(vec![]),
        }
    }

    fn launches_of(&self, graph: &CudaGraph) -> Result<Vec<Launched>> {
        let threads = self.room()?.threads;
        let nodes = nodes(graph)?;
        let kernels = nodes.into_iter().filter_map(|node| kernel_node(node).transpose());
        kernels
            .map(|params| {
                let params = params?;
                let function = function(&params)?;
                let block = [params.blockDimX, params.blockDimY, params.blockDimZ];
                let of_block = block.iter().product::<u32>();
                let shared = params.sharedMemBytes;
                let blocks = blocks_per_multiprocessor(function, of_block, shared)?;
                // A warp runs whole.
                let running = f64::from(blocks) * f64::from(of_block.next_multiple_of(32));
                let occupancy = (1e4 * running / f64::from(threads.max(1))).round() / 1e4;
                Ok(Launched {
                    kernel: name(function)?,
                    grid: [params.gridDimX, params.gridDimY, params.gridDimZ],
                    block,
                    dynamic_shared_bytes: shared,
                    attributes: attributes(function)?,
                    blocks_per_multiprocessor: blocks,
                    occupancy,
                })
            })
            .collect()
    }
}

fn nodes(graph: &CudaGraph) -> Result<Vec<sys::CUgraphNode>> {
    let ask = |nodes: *mut sys::CUgraphNode, count: &mut usize| {
        // SAFETY: the graph is live; `nodes` is null, or has room for `count` handles.
        let asked = unsafe { sys::cuGraphGetNodes(graph.cu_graph(), nodes, count) };
        asked.result().map_err(|e| driver_error("cuGraphGetNodes", e))
    };
    let mut count = 0;
    ask(std::ptr::null_mut(), &mut count)?;
    let mut nodes = vec![std::ptr::null_mut(); count];
    if count > 0 {
        ask(nodes.as_mut_ptr(), &mut count)?;
    }
    nodes.truncate(count);
    Ok(nodes)
}

/// None of a node that is no kernel.
fn kernel_node(node: sys::CUgraphNode) -> Result<Option<sys::CUDA_KERNEL_NODE_PARAMS>> {
    let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
    // SAFETY: the node is of a live graph, and the driver writes its type.
    let asked = unsafe { sys::cuGraphNodeGetType(node, &raw mut kind) };
    asked.result().map_err(|e| driver_error("cuGraphNodeGetType", e))?;
    if kind != sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL {
        return Ok(None);
    }
    // SAFETY: a struct of numbers and pointers, of which all may be zero.
    let mut params: sys::CUDA_KERNEL_NODE_PARAMS = unsafe { std::mem::zeroed() };
    // SAFETY: a kernel's node of a live graph, and the driver fills the struct.
    let asked = unsafe { sys::cuGraphKernelNodeGetParams_v2(node, &raw mut params) };
    asked.result().map_err(|e| driver_error("cuGraphKernelNodeGetParams", e))?;
    Ok(Some(params))
}

/// Kernels of a library have a handle of their own.
fn function(params: &sys::CUDA_KERNEL_NODE_PARAMS) -> Result<sys::CUfunction> {
    if !params.func.is_null() {
        return Ok(params.func);
    }
    let mut function = std::ptr::null_mut();
    // SAFETY: the kernel is one that the live graph launches; the driver writes a handle.
    let asked = unsafe { sys::cuKernelGetFunction(&raw mut function, params.kern) };
    asked.result().map_err(|e| driver_error("cuKernelGetFunction", e))?;
    Ok(function)
}

fn name(function: sys::CUfunction) -> Result<String> {
    if driver_version()? < 12_030 {
        return Ok(String::new());
    }
    let mut name = std::ptr::null();
    // SAFETY: the function is live, and the driver writes the address of a string that lives as long.
    let asked = unsafe { sys::cuFuncGetName(&raw mut name, function) };
    asked.result().map_err(|e| driver_error("cuFuncGetName", e))?;
    if name.is_null() {
        return Ok(String::new());
    }
    // SAFETY: it ends with a NUL.
    let name = unsafe { std::ffi::CStr::from_ptr(name) };
    Ok(demangled(&name.to_string_lossy()))
}

/// As it stands in the source, without parameters, result and anonymous namespaces; a name of C stays as it is.
fn demangled(name: &str) -> String {
    let options = DemangleOptions::new().no_params().no_return_type().hide_expression_literal_types();
    let symbol = Symbol::new(name).ok().and_then(|symbol| symbol.demangle_with_options(&options).ok());
    symbol.map_or_else(|| name.into(), |text| text.replace("(anonymous namespace)::", ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_source() {
        assert_eq!(demangled("toy"), "toy");
        assert_eq!(demangled("_ZN12_GLOBAL__N_14scanILi256EfEEvPT0_m"), "scan<256, float>");
        assert_eq!(demangled("_Z4fillPfi"), "fill");
        assert_eq!(demangled("_Z4normILj2ELb0EEvPf"), "norm<2, false>");
    }
}
