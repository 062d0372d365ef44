//! Runs a parsed template.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use indexmap::IndexMap;

use super::access::{member, slice, subscript};
use super::arguments::Given;
use super::ast::{Arguments, Expr, For, Macro, Stmt, StmtKind, Suffix, Target};
use super::error::{Failure, Kind, Outcome};
use super::limits::{Meter, RANGE_ITEMS, RUN_DEPTH};
use super::operators::{arithmetic, compare, negative};
use super::text::{Builder, Text};
use super::value::{Cycler, Joiner, Loop, Namespace, Value, dict, list, tuple};
use super::write::{print, to_text};
use super::{filters, methods, predicates};

/// Bytes that a scope or a macro takes, about.
const SCOPE_BYTES: usize = 256;

/// The names that every template knows.
const FUNCTIONS: [&str; 7] =
    ["range", "dict", "namespace", "cycler", "joiner", "raise_exception", "strftime_now"];

/// One run of one template.
pub(super) struct Run<'t> {
    pub(super) meter: Rc<Meter>,
    scopes: Vec<Scope>,
    scope: usize,
    depth: usize,
    macros: Vec<Closure<'t>>,
    loops: Vec<(&'t For, usize)>,
    now: &'t dyn Fn(&str) -> String,
}

/// Names of one block. Scopes that a macro can see stay until the run ends.
struct Scope {
    names: HashMap<String, Value>,
    parent: Option<usize>,
    kept: bool,
}

struct Closure<'t> {
    definition: &'t Macro,
    scope: usize,
}

/// Where a statement leaves the run.
#[derive(PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

impl<'t> Run<'t> {
    pub(super) fn new(
        meter: &Rc<Meter>,
        names: HashMap<String, Value>,
        now: &'t dyn Fn(&str) -> String,
    ) -> Self {
        let root = Scope { names, parent: None, kept: true };
        Self {
            meter: Rc::clone(meter),
            scopes: vec![root],
            scope: 0,
            depth: 0,
            macros: Vec::new(),
            loops: Vec::new(),
            now,
        }
    }

    pub(super) fn template(&mut self, body: &'t [Stmt], out: &mut Builder) -> Outcome<()> {
        self.body(body, out).map(|_| ())
    }

    /// Runs `work` one level deeper.
    fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        if self.depth == RUN_DEPTH {
            return Err(Failure::limit("levels of nesting", RUN_DEPTH as u64));
        }
        self.depth += 1;
        let result = work(self);
        self.depth -= 1;
        result
    }

    /// Runs `work` in a new scope within `parent`.
    fn scoped<T>(
        &mut self,
        parent: usize,
        work: impl FnOnce(&mut Self) -> Outcome<T>,
    ) -> Outcome<T> {
        self.meter.take(SCOPE_BYTES)?;
        let outer = self.scope;
        let scope = Scope { names: HashMap::new(), parent: Some(parent), kept: false };
        self.scopes.push(scope);
        self.scope = self.scopes.len() - 1;
        let result = work(self);
        if self.scope + 1 == self.scopes.len() && !self.scopes[self.scope].kept {
            self.scopes.pop();
            self.meter.release(SCOPE_BYTES);
        }
        self.scope = outer;
        result
    }

    fn set(&mut self, name: &str, value: Value) {
        self.scopes[self.scope].names.insert(name.to_owned(), value);
    }

    fn find(&self, name: &str) -> Option<Value> {
        let mut scope = Some(self.scope);
        while let Some(index) = scope {
            if let Some(value) = self.scopes[index].names.get(name) {
                return Some(value.clone());
            }
            scope = self.scopes[index].parent;
        }
        FUNCTIONS.iter().find(|known| **known == name).map(|name| Value::Function(name))
    }

    fn body(&mut self, body: &'t [Stmt], out: &mut Builder) -> Outcome<Flow> {
        self.deeper(|run| {
            for statement in body {
                run.meter.step(1)?;
                let flow = run.statement(statement, out).map_err(|e| e.at(statement.line))?;
                if flow != Flow::Next {
                    return Ok(flow);
                }
            }
            Ok(Flow::Next)
        })
    }

    /// The text that `body` makes.
    fn captured(&mut self, body: &'t [Stmt]) -> Outcome<Text> {
        let mut out = Builder::new(&self.meter);
        self.body(body, &mut out)?;
        Ok(out.finish())
    }

    fn statement(&mut self, statement: &'t Stmt, out: &mut Builder) -> Outcome<Flow> {
        match &statement.kind {
            StmtKind::Raw(text) => out.push(text, false)?,
            StmtKind::Print(value) => print(&self.eval(value)?, out)?,
            StmtKind::For(statement) => {
                let items = self.eval(&statement.items)?;
                let recursion =
                    statement.recursive.then(|| self.keep_loop(statement)).transpose()?;
                self.for_loop(statement, &items, self.scope, 0, recursion, out)?;
            }
            StmtKind::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.eval(condition)?.is_true() {
                        return self.body(body, out);
                    }
                }
                return self.body(otherwise, out);
            }
            StmtKind::Set(target, value) => {
                let value = self.eval(value)?;
                self.assign(target, value)?;
            }
            StmtKind::SetBlock(target, suffixes, body) => {
                let text = self.scoped(self.scope, |run| run.captured(body))?;
                let value = self.suffixes(Value::Str(text), suffixes, "")?;
                self.assign(target, value)?;
            }
            StmtKind::With(assignments, body) => {
                let mut values = Vec::with_capacity(assignments.len());
                for (_, value) in assignments {
                    values.push(self.eval(value)?);
                }
                return self.scoped(self.scope, |run| {
                    for ((target, _), value) in assignments.iter().zip(values) {
                        run.assign(target, value)?;
                    }
                    run.body(body, out)
                });
            }
            StmtKind::Macro(definition) => {
                let value = self.define(definition)?;
                self.set(&definition.name, value);
            }
            StmtKind::CallBlock(definition, call) => {
                let caller = self.define(definition)?;
                let value = self.call_block(call, caller)?;
                print(&value, out)?;
            }
            StmtKind::FilterBlock(suffixes, body) => {
                let text = self.scoped(self.scope, |run| run.captured(body))?;
                let value = self.suffixes(Value::Str(text), suffixes, "")?;
                print(&value, out)?;
            }
            StmtKind::Generation(body) => {
                self.scoped(self.scope, |run| run.body(body, out))?;
            }
            StmtKind::Do(value) => {
                self.eval(value)?;
            }
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn keep_loop(&mut self, statement: &'t For) -> Outcome<usize> {
        self.meter.take(SCOPE_BYTES)?;
        self.keep_scopes();
        self.loops.push((statement, self.scope));
        Ok(self.loops.len() - 1)
    }

    /// Keeps every scope that can be seen from here.
    fn keep_scopes(&mut self) {
        let mut scope = Some(self.scope);
        while let Some(index) = scope.filter(|index| !self.scopes[*index].kept) {
            self.scopes[index].kept = true;
            scope = self.scopes[index].parent;
        }
    }

    fn define(&mut self, definition: &'t Macro) -> Outcome<Value> {
        self.meter.take(SCOPE_BYTES)?;
        self.keep_scopes();
        self.macros.push(Closure { definition, scope: self.scope });
        Ok(Value::Macro(self.macros.len() - 1))
    }

    fn assign(&mut self, target: &'t Target, value: Value) -> Outcome<()> {
        match target {
            Target::Name(name) => self.set(name, value),
            Target::Attribute(name, field) => {
                let Some(Value::Namespace(space)) = self.find(name) else {
                    let reason = format!("cannot assign attribute {field:?} of {name:?}");
                    return Err(Failure::failed(reason + ", which is no namespace"));
                };
                check_field(&value)?;
                let old = space.fields.borrow_mut().insert(field.clone(), value);
                drop(old);
            }
            Target::Tuple(targets) => {
                let values = value.iterate(&self.meter)?;
                if values.len() != targets.len() {
                    let (found, expected) = (values.len(), targets.len());
                    let reason = format!("cannot unpack {found} values into {expected} names");
                    return Err(Failure::failed(reason));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value)?;
                }
            }
        }
        Ok(())
    }

    fn for_loop(
        &mut self,
        statement: &'t For,
        items: &Value,
        parent: usize,
        depth: usize,
        recursion: Option<usize>,
        out: &mut Builder,
    ) -> Outcome<()> {
        let mut items = items.iterate(&self.meter)?;
        if let Some(condition) = &statement.condition {
            let mut kept = Vec::new();
            for item in items {
                let holds = self.scoped(parent, |run| {
                    run.assign(&statement.target, item.clone())?;
                    Ok(run.eval(condition)?.is_true())
                })?;
                if holds {
                    kept.push(item);
                }
            }
            items = kept;
        }
        if items.is_empty() {
            self.scoped(parent, |run| run.body(&statement.otherwise, out))?;
            return Ok(());
        }
        let bytes = items.len() * size_of::<Value>();
        self.meter.take(bytes)?;
        let items = Rc::new(items);
        let last = Rc::new(RefCell::new(None));
        for index in 0..items.len() {
            self.meter.step(1)?;
            let flow = self.scoped(parent, |run| {
                let (items, last) = (Rc::clone(&items), Rc::clone(&last));
                run.assign(&statement.target, items[index].clone())?;
                let state = Loop { index, items, depth, recursion, last };
                run.set("loop", Value::Loop(Rc::new(state)));
                run.body(&statement.body, out)
            })?;
            if flow == Flow::Break {
                break;
            }
        }
        self.meter.release(bytes);
        Ok(())
    }

    pub(super) fn eval(&mut self, expr: &'t Expr) -> Outcome<Value> {
        self.deeper(|run| {
            run.meter.step(1)?;
            run.expression(expr)
        })
    }

    fn all(&mut self, items: &'t [Expr]) -> Outcome<Vec<Value>> {
        items.iter().map(|item| self.eval(item)).collect()
    }

    fn expression(&mut self, expr: &'t Expr) -> Outcome<Value> {
        Ok(match expr {
            Expr::None => Value::None,
            Expr::Bool(value) => Value::Bool(*value),
            Expr::Int(value) => Value::Int(*value),
            Expr::Float(value) => Value::Float(*value),
            Expr::Str(text) => Value::Str(Text::literal(&self.meter, text)?),
            Expr::Name(name) => match self.find(name) {
                Some(value) => value,
                None => Value::undefined(format!("{name:?} is undefined")),
            },
            Expr::List(items) => {
                let items = self.all(items)?;
                list(&self.meter, items)?
            }
            Expr::Tuple(items) => {
                let items = self.all(items)?;
                tuple(&self.meter, items)?
            }
            Expr::Dict(items) => {
                let mut pairs = Vec::with_capacity(items.len());
                for (key, value) in items {
                    pairs.push((self.eval(key)?, self.eval(value)?));
                }
                dict(&self.meter, pairs)?
            }
            Expr::Not(_)
            | Expr::Negative(_)
            | Expr::Positive(_)
            | Expr::All(_)
            | Expr::Any(_)
            | Expr::Compare(..)
            | Expr::Arithmetic(..)
            | Expr::Concat(_) => self.operation(expr)?,
            Expr::Choice(branches, otherwise) => {
                for (value, condition) in branches {
                    if self.eval(condition)?.is_true() {
                        return self.eval(value);
                    }
                }
                match otherwise {
                    Some(value) => self.eval(value)?,
                    None => Value::undefined("the condition is false and there is no else"),
                }
            }
            Expr::Postfix(first, suffixes) => {
                let value = self.eval(first)?;
                let name = if let Expr::Name(name) = &**first { name } else { "" };
                self.suffixes(value, suffixes, name)?
            }
        })
    }

    /// An expression with operators.
    fn operation(&mut self, expr: &'t Expr) -> Outcome<Value> {
        Ok(match expr {
            Expr::Not(value) => Value::Bool(!self.eval(value)?.is_true()),
            Expr::Negative(value) => negative(&self.eval(value)?)?,
            Expr::Positive(value) => match self.eval(value)? {
                value if value.is_number() => value,
                other => {
                    let found = other.type_name();
                    return Err(Failure::failed(format!(
                        "bad operand type for unary +: {found:?}"
                    )));
                }
            },
            Expr::All(items) | Expr::Any(items) => {
                let until = matches!(expr, Expr::Any(_));
                let mut value = Value::None;
                for item in items {
                    value = self.eval(item)?;
                    if value.is_true() == until {
                        break;
                    }
                }
                value
            }
            Expr::Compare(first, rest) => {
                let mut left = self.eval(first)?;
                for (comparison, right) in rest {
                    let right = self.eval(right)?;
                    if !compare(&self.meter, *comparison, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            Expr::Arithmetic(first, rest) => {
                let mut value = self.eval(first)?;
                for (operator, right) in rest {
                    let right = self.eval(right)?;
                    value = arithmetic(&self.meter, *operator, &value, &right)?;
                }
                value
            }
            Expr::Concat(items) => {
                let mut out = Builder::new(&self.meter);
                for item in items {
                    print(&self.eval(item)?, &mut out)?;
                }
                Value::Str(out.finish())
            }
            other => self.expression(other)?,
        })
    }

    /// `value` with its suffixes; `name` is what it is called, for messages.
    fn suffixes(&mut self, mut value: Value, suffixes: &'t [Suffix], name: &str) -> Outcome<Value> {
        for suffix in suffixes {
            self.meter.step(1)?;
            value = match suffix {
                Suffix::Attribute(field) => member(&value, field)?,
                Suffix::Item(key) => {
                    let key = self.eval(key)?;
                    subscript(&value, &key)?
                }
                Suffix::Slice(parts) => {
                    let mut bounds = [Value::None, Value::None, Value::None];
                    for (bound, part) in bounds.iter_mut().zip(parts) {
                        if let Some(part) = part {
                            *bound = self.eval(part)?;
                        }
                    }
                    slice(&self.meter, &value, bounds)?
                }
                Suffix::Call(arguments) => {
                    let given = self.given(arguments)?;
                    self.call(&value, given, name)?
                }
                Suffix::Filter(filter, arguments) => {
                    let given = self.given(arguments)?;
                    filters::apply(&self.meter, filter, &value, &given)?
                }
                Suffix::Test(test, arguments, negated) => {
                    let given = self.given(arguments)?;
                    Value::Bool(predicates::holds(&self.meter, test, &value, &given)? != *negated)
                }
            };
        }
        Ok(value)
    }

    fn given(&mut self, arguments: &'t Arguments) -> Outcome<Given> {
        let mut given = Given { positional: self.all(&arguments.positional)?, named: Vec::new() };
        if let Some(list) = &arguments.list {
            let items = self.eval(list)?.iterate(&self.meter)?;
            given.positional.extend(items);
        }
        for (name, value) in &arguments.named {
            given.named.push((name.clone(), self.eval(value)?));
        }
        if let Some(fields) = &arguments.dict {
            let Value::Dict(fields) = self.eval(fields)? else {
                return Err(Failure::failed("argument after ** must be a mapping"));
            };
            for (key, value) in fields.entries.values() {
                let key =
                    key.as_str().ok_or_else(|| Failure::failed("keywords must be strings"))?;
                given.named.push((key.to_owned(), value.clone()));
            }
        }
        Ok(given)
    }

    fn call_block(&mut self, call: &'t Expr, caller: Value) -> Outcome<Value> {
        let Expr::Postfix(first, suffixes) = call else { return Ok(Value::None) };
        let Some((Suffix::Call(arguments), before)) = suffixes.split_last() else {
            return Ok(Value::None);
        };
        let name = if let Expr::Name(name) = &**first { name } else { "" };
        let value = self.eval(first)?;
        let value = self.suffixes(value, before, name)?;
        let mut given = self.given(arguments)?;
        given.named.push(("caller".into(), caller));
        self.call(&value, given, name)
    }

    pub(super) fn call(&mut self, value: &Value, given: Given, name: &str) -> Outcome<Value> {
        self.meter.step(1)?;
        match value {
            Value::Function(function) => self.function(function, &given),
            Value::Macro(index) => self.deeper(|run| run.call_macro(*index, given)),
            Value::Method(method) => methods::call(&self.meter, &method.0, &method.1, &given),
            Value::Loop(state) => self.recurse(state, &given),
            Value::Joiner(joiner) => {
                let mut used = joiner.used.borrow_mut();
                let first = !std::mem::replace(&mut *used, true);
                match first {
                    true => Ok(Value::Str(Text::literal(&self.meter, "")?)),
                    false => Ok(joiner.separator.clone()),
                }
            }
            Value::Undefined(reason) => Err(Failure::failed(&**reason)),
            other => {
                let found = other.type_name();
                Err(Failure::failed(format!("{found:?} object is not callable: {name}")))
            }
        }
    }

    fn recurse(&mut self, state: &Loop, given: &Given) -> Outcome<Value> {
        let [items] = given.bind("loop", ["iterable"])?;
        let Some((statement, scope)) = state.recursion.map(|index| self.loops[index]) else {
            let reason = "the loop must have the 'recursive' marker to be called recursively";
            return Err(Failure::failed(reason));
        };
        let items = items.unwrap_or(Value::None);
        let mut out = Builder::new(&self.meter);
        self.deeper(|run| {
            let depth = state.depth + 1;
            run.for_loop(statement, &items, scope, depth, state.recursion, &mut out)
        })?;
        Ok(Value::Str(out.finish()))
    }

    fn call_macro(&mut self, index: usize, given: Given) -> Outcome<Value> {
        let Closure { definition, scope } = self.macros[index];
        let text = self.scoped(scope, |run| {
            let mut positional = given.positional.into_iter();
            let mut named: IndexMap<String, Value> = given.named.into_iter().collect();
            let caller = named.shift_remove("caller");
            run.set("caller", caller.unwrap_or_else(|| Value::undefined("No caller defined")));
            for (name, default) in &definition.parameters {
                let value = match positional.next().or_else(|| named.shift_remove(name)) {
                    Some(value) => value,
                    None => match default {
                        Some(default) => run.eval(default)?,
                        None => Value::undefined(format!("parameter {name:?} was not provided")),
                    },
                };
                run.set(name, value);
            }
            let rest = tuple(&run.meter, positional.collect())?;
            run.set("varargs", rest);
            let pairs = named
                .into_iter()
                .map(|(name, value)| Ok((Value::Str(Text::literal(&run.meter, &name)?), value)));
            let pairs = pairs.collect::<Outcome<Vec<_>>>()?;
            let rest = dict(&run.meter, pairs)?;
            run.set("kwargs", rest);
            run.captured(&definition.body)
        })?;
        Ok(Value::Str(text))
    }

    fn function(&mut self, name: &'static str, given: &Given) -> Outcome<Value> {
        match name {
            "range" => self.range(given),
            "dict" => {
                let mut pairs = Vec::new();
                match given.positional.as_slice() {
                    [] => {}
                    [Value::Dict(fields)] => pairs.extend(fields.entries.values().cloned()),
                    [pairs_of, ..] => {
                        for pair in pairs_of.iterate(&self.meter)? {
                            let pair = pair.iterate(&self.meter)?;
                            let [key, value] = pair.as_slice() else {
                                return Err(Failure::failed("dict() needs pairs"));
                            };
                            pairs.push((key.clone(), value.clone()));
                        }
                    }
                }
                for (name, value) in &given.named {
                    let name = Text::literal(&self.meter, name)?;
                    pairs.push((Value::Str(name), value.clone()));
                }
                dict(&self.meter, pairs)
            }
            "namespace" => {
                let mut fields = IndexMap::new();
                if let Some(Value::Dict(given)) = given.positional.first() {
                    for (key, value) in given.entries.values() {
                        fields.insert(key.as_str().unwrap_or_default().to_owned(), value.clone());
                    }
                }
                fields.extend(given.named.iter().cloned());
                fields.values().try_for_each(check_field)?;
                Ok(Value::Namespace(Rc::new(Namespace { fields: RefCell::new(fields) })))
            }
            "cycler" if given.positional.is_empty() => Err(Failure::failed("at least one item")),
            "cycler" => {
                let items = given.positional.clone();
                Ok(Value::Cycler(Rc::new(Cycler { items, at: RefCell::new(0) })))
            }
            "joiner" => {
                let [separator] = given.bind("joiner", ["sep"])?;
                let separator = match separator {
                    Some(separator) => separator,
                    None => Value::Str(Text::literal(&self.meter, ", ")?),
                };
                Ok(Value::Joiner(Rc::new(Joiner { separator, used: RefCell::new(false) })))
            }
            "strftime_now" => {
                let [format] = given.bind("strftime_now", ["format"])?;
                let format = format.as_ref().and_then(Value::as_str);
                let format =
                    format.ok_or_else(|| Failure::failed("strftime_now() needs a format"))?;
                self.meter.foresee(format.len().saturating_mul(64))?;
                Ok(Value::Str(Text::literal(&self.meter, &(self.now)(format))?))
            }
            _ => {
                let [message] = given.bind("raise_exception", ["message"])?;
                let message = to_text(&message.unwrap_or(Value::None), &self.meter)?;
                Err(Failure { kind: Kind::Refused(message.as_str().to_owned()), line: None })
            }
        }
    }

    fn range(&mut self, given: &Given) -> Outcome<Value> {
        let numbers = given.positional.iter().map(|value| {
            let found = value.type_name();
            let reason = || format!("{found:?} object cannot be interpreted as an integer");
            value.as_int().ok_or_else(|| Failure::failed(reason()))
        });
        let numbers = numbers.collect::<Outcome<Vec<i128>>>()?;
        let (start, stop, step) = match numbers.as_slice() {
            [stop] => (0, *stop, 1),
            [start, stop] => (*start, *stop, 1),
            [start, stop, step] => (*start, *stop, *step),
            _ => return Err(Failure::failed("range() takes 1 to 3 arguments")),
        };
        if step == 0 {
            return Err(Failure::failed("range() arg 3 must not be zero"));
        }
        let distance =
            if step > 0 { stop.saturating_sub(start) } else { start.saturating_sub(stop) };
        let count = if distance <= 0 { 0 } else { (distance - 1) / step.abs() + 1 };
        if count > RANGE_ITEMS {
            return Err(Failure::limit("items in a range", RANGE_ITEMS as u64));
        }
        self.meter.step(count as u64 / 8)?;
        list(&self.meter, (0..count).map(|index| Value::Int(start + index * step)).collect())
    }
}

/// A namespace changes, so that one inside another could hold itself.
fn check_field(value: &Value) -> Outcome<()> {
    match value.holds_namespace() {
        true => Err(Failure::failed("a namespace cannot hold a namespace or the state of a loop")),
        false => Ok(()),
    }
}
