//! `halfbyte bench report`: one page of HTML from any CSV files of results.
//!
//! The page needs nothing but itself. What is small (environment, steps, decoding, loading) is written here as HTML and
//! can be read without a script; the kernels' rows travel as JSON, of which `page.js` draws the charts and the table.
//! Every string of a CSV is untrusted: the template escapes it, `data::embed` does for JSON.

mod data;
mod environment;
mod group;
mod html;
mod ops;
mod steps;
#[cfg(test)]
mod tests;

use minijinja::Environment;
use minijinja::value::{Serde, Value};
use serde_json::json;

use super::results::{self, DecodeRow, KernelRow, LoadRow, Row, StepOpRow, StepRow, Table};

/// The rows that a page shows, by table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    kernels: Vec<KernelRow>,
    steps: Vec<StepRow>,
    step_ops: Vec<StepOpRow>,
    decode: Vec<DecodeRow>,
    load: Vec<LoadRow>,
}

impl Report {
    /// The rows of these tables, in their order.
    pub fn new(tables: impl IntoIterator<Item = Table>) -> Self {
        let mut all = Self::default();
        for table in tables {
            match table {
                Table::Kernels(rows) => all.kernels.extend(rows),
                Table::Steps(rows) => all.steps.extend(rows),
                Table::StepOps(rows) => all.step_ops.extend(rows),
                Table::Decode(rows) => all.decode.extend(rows),
                Table::Load(rows) => all.load.extend(rows),
            }
        }
        // Before there was a column for it, only halfbyte wrote rows.
        let tools = all.kernels.iter_mut().map(|r| &mut r.tool);
        let tools = tools.chain(all.steps.iter_mut().map(|r| &mut r.tool));
        let tools = tools.chain(all.step_ops.iter_mut().map(|r| &mut r.tool));
        tools.filter(|tool| tool.is_empty()).for_each(|tool| *tool = "halfbyte".into());
        Self {
            kernels: last_of_each(all.kernels),
            steps: last_of_each(all.steps),
            step_ops: last_of_each(all.step_ops),
            decode: last_of_each(all.decode),
            load: last_of_each(all.load),
        }
    }

    /// How many rows of each table it shows; tables without rows are left out.
    pub fn counts(&self) -> Vec<(&'static str, usize)> {
        let all = [
            (KernelRow::TABLE, self.kernels.len()),
            (StepRow::TABLE, self.steps.len()),
            (StepOpRow::TABLE, self.step_ops.len()),
            (DecodeRow::TABLE, self.decode.len()),
            (LoadRow::TABLE, self.load.len()),
        ];
        all.into_iter().filter(|(_, rows)| *rows > 0).collect()
    }

    /// The page. The same rows give the same bytes. The error is the template engine's: a bug.
    pub fn html(&self) -> Result<String, minijinja::Error> {
        let counts = self.counts().into_iter().map(|(table, rows)| json!([table, html::grouped(rows as f64)]));
        let context = json!({
            "css": include_str!("page.css"),
            "scripts": [include_str!("page.js"), include_str!("charts.js"), include_str!("table.js")],
            "counts": counts.collect::<Vec<_>>(),
            "environment": environment::context(self),
            "kernels": !self.kernels.is_empty(),
            "data": data::embed(&data::kernels(&self.kernels)),
            "steps": steps::context(&self.steps),
            "step_ops": ops::context(&self.step_ops),
            "decode": html::decode(&self.decode),
            "load": html::load(&self.load),
        });
        let mut engine = Environment::new();
        // The name's ending switches the escapes on.
        engine.add_template("page.html", include_str!("page.html"))?;
        engine.get_template("page.html")?.render(Value::from(Serde(&context)))
    }
}

/// Of rows that measured the same at the same commit the last.
fn last_of_each<R: Row>(rows: Vec<R>) -> Vec<R> {
    let columns = [R::MEASURED, &["commit"]].concat();
    results::last_of_each(rows, |row| results::cells(row, &columns))
}
