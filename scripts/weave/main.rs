// SPDX-License-Identifier: GPL-2.0

//! Weaves mutants into a source file, so that one build has all of them, and a
//! number that is read while the program runs selects the one that is in force.
//!
//! `weave SELECTED FILE < MUTANTS` writes the woven file to standard output.
//! `SELECTED` is the path of a function that returns the number. A line of
//! `MUTANTS` has, separated by tabs: the number, the genre, line and column of the
//! start and of the end (as cargo-mutants counts, from 1), and the replacement.
//!
//! A mutant that has no place in a woven file is named on standard error, as
//! `NUMBER reason`. Each piece of text that belongs to mutants is between
//! `/*<NUMBER NUMBER...*/` and `/*>*/`, so that an error of the compiler there can
//! be put down to them. Pieces do not nest.

use proc_macro2::Span;
use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Read, Write},
    ops::Range,
};
use syn::{
    spanned::Spanned,
    visit::{self, Visit},
};

/// A mutant, as it is read.
struct Mutant {
    number: u32,
    genre: String,
    place: Range<usize>,
    replacement: String,
}

/// Text to be inserted. Of those at one place, the ends of what is inside come
/// before the ends of what is outside, and the beginnings the other way around.
struct Insertion {
    at: usize,
    is_start: bool,
    length: usize,
    text: String,
}

struct Weaver<'a> {
    source: &'a str,
    selected: &'a str,
    mutants: Vec<Mutant>,
    /// Whether a mutant has its place, by its index.
    woven: Vec<bool>,
    reasons: BTreeMap<u32, &'static str>,
    insertions: Vec<Insertion>,
    /// Depth of constants, where nothing can be selected while the program runs.
    constants: u32,
}

/// A place in the source as a byte offset.
fn offset(source: &str, line: usize, column: usize) -> usize {
    let start: usize = source
        .split_inclusive('\n')
        .take(line - 1)
        .map(str::len)
        .sum();
    let columns = source[start..].char_indices().nth(column - 1);
    columns.map_or(source.len(), |(at, _)| start + at)
}

/// Whether a condition binds with `let`, outside of blocks.
struct HasLet(bool);

impl<'ast> Visit<'ast> for HasLet {
    fn visit_expr_let(&mut self, _: &'ast syn::ExprLet) {
        self.0 = true;
    }

    fn visit_block(&mut self, _: &'ast syn::Block) {}
}

impl Weaver<'_> {
    fn range(&self, span: Span) -> Range<usize> {
        span.byte_range()
    }

    /// Takes the mutants of these genres at a place, by index.
    fn take(&mut self, genres: &[&str], fits: impl Fn(&Range<usize>) -> bool) -> Vec<usize> {
        let found: Vec<usize> = (0..self.mutants.len())
            .filter(|&i| {
                let mutant = &self.mutants[i];
                !self.woven[i] && genres.contains(&mutant.genre.as_str()) && fits(&mutant.place)
            })
            .collect();
        for &i in &found {
            self.woven[i] = true;
            if self.constants > 0 {
                self.reasons.insert(self.mutants[i].number, "in a constant");
            }
        }
        if self.constants > 0 {
            return Vec::new();
        }
        found
    }

    fn refuse(&mut self, found: &[usize], reason: &'static str) {
        for &i in found {
            self.reasons.insert(self.mutants[i].number, reason);
        }
    }

    fn insert(&mut self, node: &Range<usize>, before: String, after: &str) {
        let length = node.len();
        self.insertions.push(Insertion {
            at: node.start,
            is_start: true,
            length,
            text: before,
        });
        self.insertions.push(Insertion {
            at: node.end,
            is_start: false,
            length,
            text: after.to_owned(),
        });
    }

    /// Chooses between variants of an expression.
    fn choose(&mut self, node: &Range<usize>, variants: &[(u32, String)]) {
        if variants.is_empty() {
            return;
        }
        let all: Vec<String> = variants
            .iter()
            .map(|(number, _)| number.to_string())
            .collect();
        let mut before = format!("(/*<{}*/match {}() /*>*/{{\n", all.join(" "), self.selected);
        for (number, text) in variants {
            before += &format!("/*<{number}*/ {number} => {{ {text} }} /*>*/\n");
        }
        before += "_ => {";
        self.insert(node, before, "}})");
    }

    fn function(&mut self, block: &syn::Block) {
        let braces = self.range(block.span());
        let body = braces.start + 1..braces.end - 1;
        let statements = match (block.stmts.first(), block.stmts.last()) {
            (Some(first), Some(last)) => {
                self.range(first.span()).start..self.range(last.span()).end
            }
            _ => body.clone(),
        };
        let found = self.take(&["FnValue"], |place| {
            place.start >= braces.start
                && place.start <= statements.start
                && place.end >= statements.end
                && place.end <= braces.end
        });
        let mut text = String::new();
        for i in found {
            let Mutant {
                number,
                replacement,
                ..
            } = &self.mutants[i];
            text += &format!(
                "\n/*<{number}*/ if {}() == {number} {{ return {replacement}; }} /*>*/",
                self.selected
            );
        }
        if !text.is_empty() {
            self.insert(&body, text, "");
        }
        visit::visit_block(self, block);
    }
}

impl<'ast> Visit<'ast> for Weaver<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.block);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.block);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(block);
        }
    }

    fn visit_item_const(&mut self, item: &'ast syn::ItemConst) {
        self.constants += 1;
        visit::visit_item_const(self, item);
        self.constants -= 1;
    }

    fn visit_impl_item_const(&mut self, item: &'ast syn::ImplItemConst) {
        self.constants += 1;
        visit::visit_impl_item_const(self, item);
        self.constants -= 1;
    }

    fn visit_item_static(&mut self, item: &'ast syn::ItemStatic) {
        self.constants += 1;
        visit::visit_item_static(self, item);
        self.constants -= 1;
    }

    fn visit_type_array(&mut self, item: &'ast syn::TypeArray) {
        self.constants += 1;
        visit::visit_type_array(self, item);
        self.constants -= 1;
    }

    fn visit_expr_binary(&mut self, expr: &'ast syn::ExprBinary) {
        let operator = self.range(expr.op.span());
        let node = self.range(expr.span());
        let found = self.take(&["BinaryOperator"], |place| *place == operator);
        let mut has_let = HasLet(false);
        has_let.visit_expr_binary(expr);
        if has_let.0 {
            self.refuse(&found, "a condition that binds");
        } else {
            let variants: Vec<(u32, String)> = found
                .iter()
                .map(|&i| {
                    let mutant = &self.mutants[i];
                    let left = &self.source[node.start..operator.start];
                    let right = &self.source[operator.end..node.end];
                    (
                        mutant.number,
                        format!("{left}{}{right}", mutant.replacement),
                    )
                })
                .collect();
            self.choose(&node, &variants);
        }
        visit::visit_expr_binary(self, expr);
    }

    fn visit_expr_unary(&mut self, expr: &'ast syn::ExprUnary) {
        let operator = self.range(expr.op.span());
        let node = self.range(expr.span());
        let found = self.take(&["UnaryOperator"], |place| *place == operator);
        let variants: Vec<(u32, String)> = found
            .iter()
            .map(|&i| {
                let mutant = &self.mutants[i];
                let right = &self.source[operator.end..node.end];
                (mutant.number, format!("{} {right}", mutant.replacement))
            })
            .collect();
        self.choose(&node, &variants);
        visit::visit_expr_unary(self, expr);
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        let whole = self.range(arm.span());
        let removed = self.take(&["MatchArm"], |place| {
            place.start == whole.start && place.end.abs_diff(whole.end) <= 1
        });
        let condition: Vec<String> = removed
            .iter()
            .map(|&i| {
                let number = self.mutants[i].number;
                format!("/*<{number}*/ {}() != {number} /*>*/", self.selected)
            })
            .collect();
        let condition = condition.join(" && ");
        if let Some((_, guard)) = &arm.guard {
            let node = self.range(guard.span());
            let found = self.take(&["MatchArmGuard"], |place| *place == node);
            let mut has_let = HasLet(false);
            has_let.visit_expr(guard);
            if has_let.0 {
                self.refuse(&found, "a condition that binds");
                self.refuse(&removed, "a condition that binds");
            } else {
                if !condition.is_empty() {
                    let before = format!("{condition} && (");
                    // Outside of what the guard itself becomes.
                    self.insertions.push(Insertion {
                        at: node.start,
                        is_start: true,
                        length: node.len() + 1,
                        text: before,
                    });
                    self.insertions.push(Insertion {
                        at: node.end,
                        is_start: false,
                        length: node.len() + 1,
                        text: ")".to_owned(),
                    });
                }
                let variants: Vec<(u32, String)> = found
                    .iter()
                    .map(|&i| (self.mutants[i].number, self.mutants[i].replacement.clone()))
                    .collect();
                self.choose(&node, &variants);
            }
        } else if !condition.is_empty() {
            let end = self.range(arm.pat.span()).end;
            self.insertions.push(Insertion {
                at: end,
                is_start: false,
                length: 0,
                text: format!(" if {condition}"),
            });
        }
        visit::visit_arm(self, arm);
    }
}

fn read_mutant(line: &str, source: &str) -> Option<Mutant> {
    let mut fields = line.splitn(7, '\t');
    let number = fields.next()?.parse().ok()?;
    let genre = fields.next()?.to_owned();
    let mut place = || fields.next()?.parse::<usize>().ok();
    let start = offset(source, place()?, place()?);
    let end = offset(source, place()?, place()?);
    let replacement = fields.next()?.to_owned();
    Some(Mutant {
        number,
        genre,
        place: start..end,
        replacement,
    })
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().collect();
    let [_, selected, path] = arguments.as_slice() else {
        return Err(io::Error::other("usage: weave SELECTED FILE < MUTANTS"));
    };
    let source = fs::read_to_string(path)?;
    let file = syn::parse_file(&source).map_err(io::Error::other)?;
    let mut lines = String::new();
    io::stdin().read_to_string(&mut lines)?;
    let mutants: Option<Vec<Mutant>> = lines
        .lines()
        .map(|line| read_mutant(line, &source))
        .collect();
    let mutants = mutants.ok_or_else(|| io::Error::other("a line of the mutants is wrong"))?;
    let mut weaver = Weaver {
        source: &source,
        selected,
        woven: vec![false; mutants.len()],
        mutants,
        reasons: BTreeMap::new(),
        insertions: Vec::new(),
        constants: 0,
    };
    weaver.visit_file(&file);

    for (mutant, &woven) in weaver.mutants.iter().zip(&weaver.woven) {
        if !woven {
            weaver
                .reasons
                .insert(mutant.number, "no place of this genre");
        }
    }
    for (number, reason) in &weaver.reasons {
        eprintln!("{number} {reason}");
    }
    // A longer node at one place starts earlier and ends later.
    weaver.insertions.sort_by_key(|one| {
        let length = one.length as isize;
        (
            one.at,
            one.is_start,
            if one.is_start { -length } else { length },
        )
    });
    let mut output = String::new();
    let mut at = 0;
    for insertion in &weaver.insertions {
        output += &source[at..insertion.at];
        output += &insertion.text;
        at = insertion.at;
    }
    output += &source[at..];
    io::stdout().write_all(output.as_bytes())
}
