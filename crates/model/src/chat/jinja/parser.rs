//! Tokens to a tree, by Jinja's own grammar (its `parser.py`).

use super::ast::{
    Arguments, Comparison, Expr, For, Macro, Operator, Stmt, StmtKind, Suffix, Target,
};
use super::error::{Failure, Outcome};
use super::lexer::{Token, tokens};
use super::limits::{DEPTH, SOURCE_BYTES};

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
    depth: usize,
}

/// Parses a whole template. The second value is all text in it that may be written: what is outside
/// of tags, and strings.
pub(super) fn parse(source: &str) -> Outcome<(Vec<Stmt>, String)> {
    if source.len() > SOURCE_BYTES {
        return Err(Failure::limit("bytes of source", SOURCE_BYTES as u64));
    }
    let mut parser = Parser { tokens: tokens(source)?, at: 0, depth: 0 };
    let mut literals = String::new();
    for (token, _) in &parser.tokens {
        if let Token::Raw(text) | Token::Str(text) = token {
            literals.push_str(text);
            literals.push('\n');
        }
    }
    let body = parser.body(&[])?;
    Ok((body.0, literals))
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|token| &token.0)
    }

    fn line(&self) -> usize {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens.get(self.at.min(last)).map_or(0, |token| token.1)
    }

    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get_mut(self.at).map(|token| token.0.clone());
        self.at += 1;
        token
    }

    fn error(&self, reason: impl Into<String>) -> Failure {
        Failure::syntax(reason, self.line())
    }

    fn unexpected(&self, expected: &str) -> Failure {
        let found = match self.peek() {
            None => "the end".to_owned(),
            Some(Token::Raw(_)) => "text".to_owned(),
            Some(Token::Name(name)) => format!("{name:?}"),
            Some(Token::Operator(operator)) => format!("{operator:?}"),
            Some(Token::Str(_)) => "a string".to_owned(),
            Some(Token::Int(_) | Token::Float(_)) => "a number".to_owned(),
            Some(Token::BlockEnd) => "\"%}\"".to_owned(),
            Some(Token::PrintEnd) => "\"}}\"".to_owned(),
            Some(Token::BlockBegin | Token::PrintBegin) => "a tag".to_owned(),
        };
        self.error(format!("found {found}; expected {expected}"))
    }

    fn is_operator(&self, operator: &str) -> bool {
        matches!(self.peek(), Some(Token::Operator(found)) if *found == operator)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(found)) if found == name)
    }

    fn skip_operator(&mut self, operator: &str) -> bool {
        let found = self.is_operator(operator);
        self.at += usize::from(found);
        found
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn expect_operator(&mut self, operator: &str) -> Outcome<()> {
        match self.skip_operator(operator) {
            true => Ok(()),
            false => Err(self.unexpected(&format!("{operator:?}"))),
        }
    }

    fn expect(&mut self, token: &Token, name: &str) -> Outcome<()> {
        if self.peek() == Some(token) {
            self.at += 1;
            return Ok(());
        }
        Err(self.unexpected(name))
    }

    fn name(&mut self) -> Outcome<String> {
        match self.peek() {
            Some(Token::Name(name)) => {
                let name = name.clone();
                self.at += 1;
                Ok(name)
            }
            _ => Err(self.unexpected("a name")),
        }
    }

    /// Runs `parse` one level deeper.
    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        if self.depth == DEPTH {
            return Err(Failure::limit("levels of nesting", DEPTH as u64).at(self.line()));
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }

    /// Statements up to a tag with one of the names `ends`, whose name is returned; the tag is
    /// passed up to its name.
    fn body(&mut self, ends: &[&str]) -> Outcome<(Vec<Stmt>, String)> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let kind = match self.next() {
                None if ends.is_empty() => return Ok((body, String::new())),
                None => return Err(self.error(format!("the end comes before {:?}", ends[0]))),
                Some(Token::Raw(text)) => StmtKind::Raw(text),
                Some(Token::PrintBegin) => {
                    let value = self.tuple(true)?;
                    self.expect(&Token::PrintEnd, "\"}}\"")?;
                    StmtKind::Print(value)
                }
                Some(_) => {
                    let name = self.name()?;
                    if ends.contains(&name.as_str()) {
                        return Ok((body, name));
                    }
                    self.nested(|parser| parser.statement(&name))?
                }
            };
            body.push(Stmt { line, kind });
        }
    }

    fn block_end(&mut self) -> Outcome<()> {
        self.expect(&Token::BlockEnd, "\"%}\"")
    }

    /// The body of a tag that ends with `end`, both tags included.
    fn block(&mut self, end: &str) -> Outcome<Vec<Stmt>> {
        self.block_end()?;
        let (body, _) = self.body(&[end])?;
        self.block_end()?;
        Ok(body)
    }

    fn statement(&mut self, name: &str) -> Outcome<StmtKind> {
        Ok(match name {
            "for" => self.for_loop()?,
            "if" => self.condition()?,
            "set" => self.set()?,
            "with" => self.with()?,
            "macro" => {
                let name = self.name()?;
                let parameters = self.parameters()?;
                let body = self.macro_body("endmacro")?;
                StmtKind::Macro(Macro { name, parameters, body })
            }
            "call" => {
                let parameters = match self.is_operator("(") {
                    true => self.parameters()?,
                    false => Vec::new(),
                };
                let call = self.expression()?;
                let last = if let Expr::Postfix(_, all) = &call { all.last() } else { None };
                if !matches!(last, Some(Suffix::Call(_))) {
                    return Err(self.error("{% call %} needs a call"));
                }
                let body = self.macro_body("endcall")?;
                StmtKind::CallBlock(Macro { name: "caller".into(), parameters, body }, call)
            }
            "filter" => {
                let mut filters = Vec::new();
                self.filter(&mut filters)?;
                while self.skip_operator("|") {
                    self.filter(&mut filters)?;
                }
                StmtKind::FilterBlock(filters, self.block("endfilter")?)
            }
            "generation" => StmtKind::Generation(self.block("endgeneration")?),
            "do" => {
                let value = self.tuple(true)?;
                self.block_end()?;
                StmtKind::Do(value)
            }
            "break" | "continue" => {
                self.block_end()?;
                if name == "break" { StmtKind::Break } else { StmtKind::Continue }
            }
            "include" | "import" | "from" | "extends" | "block" | "autoescape" => {
                let reason = format!("a chat template is one file of text: no {name:?} in it");
                return Err(self.error(reason));
            }
            _ => return Err(self.error(format!("unknown statement {name:?}"))),
        })
    }

    fn macro_body(&mut self, end: &str) -> Outcome<Vec<Stmt>> {
        self.block_end()?;
        let (body, _) = self.body(&[end])?;
        // `{% endmacro name %}`
        if matches!(self.peek(), Some(Token::Name(_))) {
            self.at += 1;
        }
        self.block_end()?;
        Ok(body)
    }

    fn for_loop(&mut self) -> Outcome<StmtKind> {
        let target = self.target()?;
        if !self.skip_name("in") {
            return Err(self.unexpected("\"in\""));
        }
        let items = self.tuple(false)?;
        let condition = match self.skip_name("if") {
            true => Some(self.expression()?),
            false => None,
        };
        let recursive = self.skip_name("recursive");
        self.block_end()?;
        let (body, end) = self.body(&["endfor", "else"])?;
        let otherwise = match end == "else" {
            true => {
                self.block_end()?;
                self.body(&["endfor"])?.0
            }
            false => Vec::new(),
        };
        self.block_end()?;
        Ok(StmtKind::For(For { target, items, condition, recursive, body, otherwise }))
    }

    fn condition(&mut self) -> Outcome<StmtKind> {
        let mut branches = Vec::new();
        loop {
            let condition = self.tuple(false)?;
            self.block_end()?;
            let (body, end) = self.body(&["endif", "elif", "else"])?;
            branches.push((condition, body));
            match end.as_str() {
                "elif" => continue,
                "else" => {
                    self.block_end()?;
                    let (otherwise, _) = self.body(&["endif"])?;
                    self.block_end()?;
                    return Ok(StmtKind::If(branches, otherwise));
                }
                _ => {
                    self.block_end()?;
                    return Ok(StmtKind::If(branches, Vec::new()));
                }
            }
        }
    }

    fn set(&mut self) -> Outcome<StmtKind> {
        let target = self.target()?;
        if self.skip_operator("=") {
            let value = self.tuple(true)?;
            self.block_end()?;
            return Ok(StmtKind::Set(target, value));
        }
        let mut filters = Vec::new();
        while self.skip_operator("|") {
            self.filter(&mut filters)?;
        }
        Ok(StmtKind::SetBlock(target, filters, self.block("endset")?))
    }

    fn with(&mut self) -> Outcome<StmtKind> {
        let mut assignments = Vec::new();
        while self.peek() != Some(&Token::BlockEnd) {
            if !assignments.is_empty() {
                self.expect_operator(",")?;
            }
            let target = self.one_target()?;
            self.expect_operator("=")?;
            assignments.push((target, self.expression()?));
        }
        Ok(StmtKind::With(assignments, self.block("endwith")?))
    }

    fn target(&mut self) -> Outcome<Target> {
        let first = self.one_target()?;
        if !self.is_operator(",") {
            return Ok(first);
        }
        let mut targets = vec![first];
        while self.skip_operator(",") {
            if !matches!(self.peek(), Some(Token::Name(name)) if name != "in")
                && !self.is_operator("(")
            {
                break;
            }
            targets.push(self.one_target()?);
        }
        Ok(Target::Tuple(targets))
    }

    fn one_target(&mut self) -> Outcome<Target> {
        if self.skip_operator("(") {
            let target = self.nested(Self::target)?;
            self.expect_operator(")")?;
            return Ok(target);
        }
        let name = self.name()?;
        if matches!(name.as_str(), "true" | "false" | "none" | "True" | "False" | "None") {
            return Err(self.error(format!("{name} is not a name to assign to")));
        }
        match self.skip_operator(".") {
            true => Ok(Target::Attribute(name, self.name()?)),
            false => Ok(Target::Name(name)),
        }
    }

    fn parameters(&mut self) -> Outcome<Vec<(String, Option<Expr>)>> {
        self.expect_operator("(")?;
        let mut parameters = Vec::new();
        while !self.skip_operator(")") {
            if !parameters.is_empty() {
                self.expect_operator(",")?;
                if self.skip_operator(")") {
                    break;
                }
            }
            let name = self.name()?;
            let default = match self.skip_operator("=") {
                true => Some(self.expression()?),
                false => None,
            };
            parameters.push((name, default));
        }
        Ok(parameters)
    }

    /// One or more expressions with commas between; more than one, or a comma, makes a tuple.
    fn tuple(&mut self, with_choice: bool) -> Outcome<Expr> {
        let one = |parser: &mut Self| match with_choice {
            true => parser.expression(),
            false => parser.nested(Self::any),
        };
        let first = one(self)?;
        if !self.is_operator(",") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_operator(",") {
            let ends = matches!(
                self.peek(),
                None | Some(Token::BlockEnd | Token::PrintEnd | Token::Operator(")"))
            );
            if ends || self.is_name("if") || self.is_name("recursive") {
                break;
            }
            items.push(one(self)?);
        }
        Ok(Expr::Tuple(items))
    }

    fn expression(&mut self) -> Outcome<Expr> {
        self.nested(Self::choice)
    }

    fn choice(&mut self) -> Outcome<Expr> {
        let mut value = self.any()?;
        let mut branches = Vec::new();
        while self.skip_name("if") {
            let condition = self.any()?;
            branches.push((value, condition));
            if !self.skip_name("else") {
                return Ok(Expr::Choice(branches, None));
            }
            value = self.any()?;
        }
        match branches.is_empty() {
            true => Ok(value),
            false => Ok(Expr::Choice(branches, Some(Box::new(value)))),
        }
    }

    fn any(&mut self) -> Outcome<Expr> {
        let first = self.all()?;
        if !self.is_name("or") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_name("or") {
            items.push(self.all()?);
        }
        Ok(Expr::Any(items))
    }

    fn all(&mut self) -> Outcome<Expr> {
        let first = self.not()?;
        if !self.is_name("and") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_name("and") {
            items.push(self.not()?);
        }
        Ok(Expr::All(items))
    }

    fn not(&mut self) -> Outcome<Expr> {
        let mut negations = 0;
        while self.skip_name("not") {
            negations += 1;
        }
        let mut value = self.compare()?;
        // Three negations are one.
        for _ in 0..if negations > 2 { 2 - negations % 2 } else { negations } {
            value = Expr::Not(Box::new(value));
        }
        Ok(value)
    }

    fn compare(&mut self) -> Outcome<Expr> {
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.peek() {
                Some(Token::Operator("==")) => Comparison::Equal,
                Some(Token::Operator("!=")) => Comparison::NotEqual,
                Some(Token::Operator("<")) => Comparison::Less,
                Some(Token::Operator("<=")) => Comparison::LessEqual,
                Some(Token::Operator(">")) => Comparison::Greater,
                Some(Token::Operator(">=")) => Comparison::GreaterEqual,
                Some(Token::Name(name)) if name == "in" => Comparison::In,
                Some(Token::Name(name)) if name == "not" => {
                    let next = self.tokens.get(self.at + 1).map(|token| &token.0);
                    if !matches!(next, Some(Token::Name(name)) if name == "in") {
                        break;
                    }
                    self.at += 1;
                    Comparison::NotIn
                }
                _ => break,
            };
            self.at += 1;
            rest.push((comparison, self.sum()?));
        }
        Ok(match rest.is_empty() {
            true => first,
            false => Expr::Compare(Box::new(first), rest),
        })
    }

    /// Operators of one precedence between operands of the next higher.
    fn chain(
        &mut self,
        operators: &[(&str, Operator)],
        operand: fn(&mut Self) -> Outcome<Expr>,
    ) -> Outcome<Expr> {
        let first = operand(self)?;
        let mut rest = Vec::new();
        while let Some(Token::Operator(found)) = self.peek()
            && let Some((_, operator)) = operators.iter().find(|known| known.0 == *found)
        {
            self.at += 1;
            rest.push((*operator, operand(self)?));
        }
        Ok(match rest.is_empty() {
            true => first,
            false => Expr::Arithmetic(Box::new(first), rest),
        })
    }

    fn sum(&mut self) -> Outcome<Expr> {
        self.chain(&[("+", Operator::Add), ("-", Operator::Subtract)], Self::concat)
    }

    fn concat(&mut self) -> Outcome<Expr> {
        let first = self.product()?;
        if !self.is_operator("~") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_operator("~") {
            items.push(self.product()?);
        }
        Ok(Expr::Concat(items))
    }

    fn product(&mut self) -> Outcome<Expr> {
        let operators = [
            ("*", Operator::Multiply),
            ("/", Operator::Divide),
            ("//", Operator::FloorDivide),
            ("%", Operator::Remainder),
        ];
        self.chain(&operators, Self::power)
    }

    fn power(&mut self) -> Outcome<Expr> {
        self.chain(&[("**", Operator::Power)], |parser| parser.unary(true))
    }

    fn unary(&mut self, with_filter: bool) -> Outcome<Expr> {
        let value = if self.skip_operator("-") {
            Expr::Negative(Box::new(self.nested(|parser| parser.unary(false))?))
        } else if self.skip_operator("+") {
            Expr::Positive(Box::new(self.nested(|parser| parser.unary(false))?))
        } else {
            self.primary()?
        };
        let mut suffixes = Vec::new();
        self.postfix(&mut suffixes)?;
        if with_filter {
            self.filters_and_tests(&mut suffixes)?;
        }
        Ok(match suffixes.is_empty() {
            true => value,
            false => Expr::Postfix(Box::new(value), suffixes),
        })
    }

    fn filters_and_tests(&mut self, suffixes: &mut Vec<Suffix>) -> Outcome<()> {
        loop {
            if self.skip_operator("|") {
                self.filter(suffixes)?;
            } else if self.skip_name("is") {
                self.test(suffixes)?;
            } else if self.is_operator("(") {
                suffixes.push(Suffix::Call(self.arguments()?));
            } else {
                return Ok(());
            }
        }
    }

    fn postfix(&mut self, suffixes: &mut Vec<Suffix>) -> Outcome<()> {
        loop {
            if self.skip_operator(".") {
                match self.next() {
                    Some(Token::Name(name)) => suffixes.push(Suffix::Attribute(name)),
                    Some(Token::Int(index)) => suffixes.push(Suffix::Item(Expr::Int(index))),
                    _ => {
                        self.at -= 1;
                        return Err(self.unexpected("a name or a number"));
                    }
                }
            } else if self.skip_operator("[") {
                let suffix = self.nested(Self::subscript)?;
                suffixes.push(suffix);
            } else if self.is_operator("(") {
                suffixes.push(Suffix::Call(self.arguments()?));
            } else {
                return Ok(());
            }
        }
    }

    fn subscript(&mut self) -> Outcome<Suffix> {
        let mut parts: [Option<Expr>; 3] = [None, None, None];
        let mut part = 0;
        let mut items = Vec::new();
        loop {
            if self.skip_operator("]") {
                break;
            }
            if part < 2 && self.skip_operator(":") {
                part += 1;
            } else if part == 0 && self.skip_operator(",") {
                items.extend(parts[0].take());
            } else if parts[part].is_none() {
                parts[part] = Some(self.expression()?);
            } else {
                return Err(self.unexpected("\"]\""));
            }
        }
        if part > 0 {
            return Ok(Suffix::Slice(parts));
        }
        let [first, ..] = parts;
        if !items.is_empty() {
            items.extend(first);
            return Ok(Suffix::Item(Expr::Tuple(items)));
        }
        // Jinja reads an empty subscript as an empty tuple.
        Ok(Suffix::Item(first.unwrap_or(Expr::Tuple(Vec::new()))))
    }

    fn dotted_name(&mut self) -> Outcome<String> {
        let mut name = self.name()?;
        while self.skip_operator(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name)
    }

    fn filter(&mut self, suffixes: &mut Vec<Suffix>) -> Outcome<()> {
        let name = self.dotted_name()?;
        let arguments = match self.is_operator("(") {
            true => self.arguments()?,
            false => Arguments::default(),
        };
        suffixes.push(Suffix::Filter(name, arguments));
        Ok(())
    }

    fn test(&mut self, suffixes: &mut Vec<Suffix>) -> Outcome<()> {
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        let begins = match self.peek() {
            Some(Token::Name(name)) => {
                !matches!(name.as_str(), "else" | "or" | "and" | "if" | "in" | "not" | "is")
            }
            Some(Token::Str(_) | Token::Int(_) | Token::Float(_)) => true,
            Some(Token::Operator(operator)) => matches!(*operator, "[" | "{"),
            _ => false,
        };
        let arguments = if self.is_operator("(") {
            self.arguments()?
        } else if begins {
            let value = self.nested(Self::primary)?;
            let mut inner = Vec::new();
            self.postfix(&mut inner)?;
            let value = match inner.is_empty() {
                true => value,
                false => Expr::Postfix(Box::new(value), inner),
            };
            Arguments { positional: vec![value], ..Arguments::default() }
        } else {
            Arguments::default()
        };
        suffixes.push(Suffix::Test(name, arguments, negated));
        Ok(())
    }

    fn arguments(&mut self) -> Outcome<Arguments> {
        self.expect_operator("(")?;
        self.nested(|parser| {
            let mut arguments = Arguments::default();
            let mut first = true;
            while !parser.skip_operator(")") {
                if !first {
                    parser.expect_operator(",")?;
                    if parser.skip_operator(")") {
                        break;
                    }
                }
                first = false;
                parser.argument(&mut arguments)?;
            }
            Ok(arguments)
        })
    }

    fn argument(&mut self, arguments: &mut Arguments) -> Outcome<()> {
        if self.skip_operator("**") {
            arguments.dict = Some(Box::new(self.expression()?));
        } else if self.skip_operator("*") {
            arguments.list = Some(Box::new(self.expression()?));
        } else if let Some(Token::Name(name)) = self.peek()
            && matches!(self.tokens.get(self.at + 1), Some((Token::Operator("="), _)))
        {
            let name = name.clone();
            self.at += 2;
            arguments.named.push((name, self.expression()?));
        } else if arguments.named.is_empty() && arguments.dict.is_none() {
            arguments.positional.push(self.expression()?);
        } else {
            return Err(self.error("a positional argument after a named one"));
        }
        Ok(())
    }

    fn primary(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let expr = match self.next() {
            Some(Token::Name(name)) => match name.as_str() {
                "true" | "True" => Expr::Bool(true),
                "false" | "False" => Expr::Bool(false),
                "none" | "None" => Expr::None,
                _ => Expr::Name(name),
            },
            Some(Token::Str(mut text)) => {
                while let Some(Token::Str(more)) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                Expr::Str(text)
            }
            Some(Token::Int(value)) => Expr::Int(value),
            Some(Token::Float(value)) => Expr::Float(value),
            Some(Token::Operator("(")) => {
                if self.skip_operator(")") {
                    return Ok(Expr::Tuple(Vec::new()));
                }
                let value = self.nested(|parser| parser.tuple(true))?;
                self.expect_operator(")")?;
                value
            }
            Some(Token::Operator("[")) => self.nested(Self::list)?,
            Some(Token::Operator("{")) => self.nested(Self::dict)?,
            _ => {
                self.at -= 1;
                return Err(self.unexpected("an expression").at(line));
            }
        };
        Ok(expr)
    }

    fn list(&mut self) -> Outcome<Expr> {
        let mut items = Vec::new();
        while !self.skip_operator("]") {
            if !items.is_empty() {
                self.expect_operator(",")?;
                if self.skip_operator("]") {
                    break;
                }
            }
            items.push(self.expression()?);
        }
        Ok(Expr::List(items))
    }

    fn dict(&mut self) -> Outcome<Expr> {
        let mut items = Vec::new();
        while !self.skip_operator("}") {
            if !items.is_empty() {
                self.expect_operator(",")?;
                if self.skip_operator("}") {
                    break;
                }
            }
            let key = self.expression()?;
            self.expect_operator(":")?;
            items.push((key, self.expression()?));
        }
        Ok(Expr::Dict(items))
    }
}
