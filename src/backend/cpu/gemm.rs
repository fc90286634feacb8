//! Matrix products: one thin, checked wrapper over the `gemm` crate.

use std::marker::PhantomData;

use gemm::Parallelism;

/// A read-only matrix: element (i, j) is `data[i * rs + j * cs]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rs: usize,
    cs: usize,
}

impl<'a> Mat<'a> {
    /// Row-major, rows `stride` apart.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, rs: stride, cs: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self { data: self.data, rs: self.cs, cs: self.rs }
    }
}

/// A matrix to write, as [`Mat`].
pub struct MatMut<'a> {
    data: *mut f32,
    len: usize,
    rs: usize,
    cs: usize,
    _data: PhantomData<&'a mut [f32]>,
}

impl<'a> MatMut<'a> {
    /// Row-major, rows `stride` apart.
    pub fn rows(data: &'a mut [f32], stride: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), rs: stride, cs: 1, _data: PhantomData }
    }
}

/// Whether a product may spread over the threads of the pool that it runs in. The bits are the same either way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    One,
    All,
}

/// What happens to the old content of the output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// c = : it may be anything, NaN too.
    Set,
    /// c +=
    Add,
}

/// c (m, n) = or += alpha * a (m, k) · b (k, n). Each element is a sum in an order that depends on the shapes alone.
pub fn gemm(
    threads: Threads,
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: Mat<'_>,
    b: Mat<'_>,
    write: Write,
    c: MatMut<'_>,
) {
    let inside = |rows: usize, cols: usize, rs: usize, cs: usize, len: usize| {
        rows == 0 || cols == 0 || (rows - 1) * rs + (cols - 1) * cs < len
    };
    assert!(inside(m, k, a.rs, a.cs, a.data.len()), "gemm: a ({m}, {k}) leaves its buffer");
    assert!(inside(k, n, b.rs, b.cs, b.data.len()), "gemm: b ({k}, {n}) leaves its buffer");
    assert!(inside(m, n, c.rs, c.cs, c.len), "gemm: c ({m}, {n}) leaves its buffer");
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    let add = write == Write::Add;
    // SAFETY: every element that the three (sizes, strides) reach lies inside its slice (asserted above); `c` is
    // borrowed exclusively, so it overlaps neither `a` nor `b`. With read_dst false the old content of c is not read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.data,
            c.cs as isize,
            c.rs as isize,
            add,
            a.data.as_ptr(),
            a.cs as isize,
            a.rs as isize,
            b.data.as_ptr(),
            b.cs as isize,
            b.rs as isize,
            if add { 1.0 } else { 0.0 },
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}
